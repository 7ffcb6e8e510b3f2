"""Advantages equal slow computations from their definitions: plain loops over plain numbers, in float64."""

import math
import random

import numpy as np
import pytest
import torch

from rlhf_critic.algorithms.gae import (
    Turns,
    decoupled_gae,
    gae,
    group_advantages,
    length_adaptive_lambda,
    turn_numbers,
    turn_rewards,
)
from rlhf_critic.algorithms.ppo import action_values, pad_rows, shaped_rewards
from tests.rlhf_critic.algorithms.definitions import SEEDS, close, random_like, random_mask


def slow_gae(rewards, values, mask, last_values, truncated, gamma, gae_lambda):
    """Computes A_t = sum_l (gamma gae_lambda)^l delta_{t+l} over the actions alone, in order."""
    advantages = torch.zeros(mask.shape, dtype=torch.float64)
    returns = torch.zeros(mask.shape, dtype=torch.float64)
    for s in range(mask.shape[0]):
        actions = [t for t in range(mask.shape[1]) if mask[s, t]]
        v = [values[s, t].item() for t in actions] + [last_values[s].item() if truncated[s] else 0.0]
        r = [rewards[s, t].item() for t in actions]
        delta = [r[i] + gamma * v[i + 1] - v[i] for i in range(len(actions))]
        for i, t in enumerate(actions):
            advantages[s, t] = sum((gamma * gae_lambda) ** (j - i) * delta[j] for j in range(i, len(actions)))
            returns[s, t] = advantages[s, t] + v[i]
    return advantages, returns


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("gae_lambda", [0.0, 0.95, 1.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_gae_equals_the_sum_over_temporal_differences(seed, gae_lambda, gamma):
    torch.manual_seed(seed)
    mask = random_mask(random.Random(seed))
    rewards, values = random_like(mask), random_like(mask)
    truncated = torch.rand(mask.shape[0]) < 0.5
    last_values = torch.randn(mask.shape[0]).masked_fill(~truncated, math.nan)
    arguments = rewards, values, mask, last_values, truncated, gamma, gae_lambda
    for actual, expected in zip(gae(*arguments), slow_gae(*arguments), strict=True):
        close(actual, expected)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("seed", SEEDS)
def test_with_lambda_1_the_returns_are_the_discounted_rewards_and_the_bootstrap(seed, gamma):
    torch.manual_seed(seed)
    mask = random_mask(random.Random(seed))
    rewards, values, last_values = random_like(mask), random_like(mask), torch.randn(mask.shape[0])
    truncated = torch.rand(mask.shape[0]) < 0.5
    _, returns = gae(rewards, values, mask, last_values, truncated, gamma, 1.0)
    expected = torch.zeros(mask.shape, dtype=torch.float64)
    for s in range(mask.shape[0]):
        to_come = last_values[s].item() if truncated[s] else 0.0
        for t in reversed(range(mask.shape[1])):
            if mask[s, t]:
                to_come = rewards[s, t].item() + gamma * to_come
                expected[s, t] = to_come
    close(returns, expected)


def test_gae_of_an_example_worked_by_hand():
    # gamma 0.5 and lambda 0.5, so an advantage includes a quarter of the next one.
    # Terminated:  delta_1 = 2 + 0.5 * 0 - 1   = 1           A_1 = 1
    #              delta_0 = 0 + 0.5 * 1 - 0.5 = 0           A_0 = 0 + 0.25 * 1     = 0.25
    # Truncated:   delta_1 = 2 + 0.5 * 4 - 1   = 3           A_1 = 3
    #              delta_0 = 0 + 0.5 * 1 - 0.5 = 0           A_0 = 0 + 0.25 * 3     = 0.75
    # One token:   delta_0 = 1 + 0.5 * 0 - 3   = -2          A_0 = -2
    # A hole:      as the terminated one, with an ignored token between the two actions
    mask = torch.tensor([[1, 1, 0], [1, 1, 0], [1, 0, 0], [1, 0, 1]]).bool()
    rewards = torch.tensor([[0.0, 2.0, 9.0], [0.0, 2.0, 9.0], [1.0, 9.0, 9.0], [0.0, 9.0, 2.0]])
    values = torch.tensor([[0.5, 1.0, 9.0], [0.5, 1.0, 9.0], [3.0, 9.0, 9.0], [0.5, 9.0, 1.0]])
    truncated = torch.tensor([False, True, False, False])
    advantages, returns = gae(rewards, values, mask, torch.full((4,), 4.0), truncated, 0.5, 0.5)
    close(advantages, [[0.25, 1.0, 0.0], [0.75, 3.0, 0.0], [-2.0, 0.0, 0.0], [0.25, 0.0, 1.0]])
    close(returns, [[0.75, 2.0, 0.0], [1.25, 4.0, 0.0], [1.0, 0.0, 0.0], [0.75, 0.0, 2.0]])


def test_a_critic_that_is_right_leaves_no_advantage():
    # The reward 1 always follows four tokens, so with gamma 0.9 the values before them are known.
    sequence = np.array([0.0, 0.9**3, 0.9**2, 0.9, 1.0, 0.0], dtype=np.float32)
    actions, last_values = action_values([sequence], [2])
    values, mask = pad_rows(actions)
    rewards = shaped_rewards(torch.tensor([1.0]), torch.zeros(1, 4), mask, 0.1)
    advantages, returns = gae(rewards, values, mask, torch.from_numpy(last_values), torch.tensor([False]), 0.9, 0.95)
    close(advantages, torch.zeros(1, 4))
    close(returns, values)


def test_gae_of_no_tokens_is_none():
    empty = torch.zeros(3, 0)
    for result in gae(empty, empty, empty.bool(), torch.ones(3), torch.tensor([True, False, True]), 1.0, 0.95):
        assert result.shape == (3, 0)
        assert result.dtype == torch.float32


def test_advantages_and_returns_are_targets_without_gradient():
    values = torch.randn(2, 3, requires_grad=True)
    mask = torch.ones(2, 3, dtype=torch.bool)
    for result in gae(torch.zeros(2, 3), values, mask, torch.zeros(2), torch.zeros(2, dtype=torch.bool), 1.0, 0.95):
        assert not result.requires_grad


def random_arguments(seed):
    """Makes rewards, values, mask, last values and truncations of rollouts with holes."""
    torch.manual_seed(seed)
    mask = random_mask(random.Random(seed))
    truncated = torch.rand(mask.shape[0]) < 0.5
    last_values = torch.randn(mask.shape[0]).masked_fill(~truncated, math.nan)
    return random_like(mask), random_like(mask), mask, last_values, truncated


@pytest.mark.parametrize("policy_lambda", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("critic_lambda", [0.5, 1.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_decoupled_gae_is_two_estimates_of_which_each_has_its_lambda(seed, policy_lambda, critic_lambda):
    arguments = random_arguments(seed)
    advantages, returns = decoupled_gae(*arguments, 0.95, policy_lambda, critic_lambda)
    close(advantages, slow_gae(*arguments, 0.95, policy_lambda)[0])
    close(returns, slow_gae(*arguments, 0.95, critic_lambda)[1])


def test_the_critics_lambda_is_1_if_none_is_given():
    arguments = random_arguments(0)
    close(decoupled_gae(*arguments, 1.0, 0.5)[1], slow_gae(*arguments, 1.0, 1.0)[1])


def test_equal_lambdas_give_the_numbers_of_one_estimate_to_the_last_digit():
    arguments = random_arguments(0)
    for one, other in zip(decoupled_gae(*arguments, 0.9, 0.8, 0.8), gae(*arguments, 0.9, 0.8), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("alpha", [0.05, 0.5, 3.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_lambda_by_length_equals_its_definition(seed, alpha):
    arguments = random_arguments(seed)
    mask = arguments[2]
    lambdas = length_adaptive_lambda(mask, alpha)
    expected = []
    for row in mask.tolist():
        weight = alpha * sum(row)
        expected.append(max(0.0, 1.0 - 1.0 / weight) if weight else 0.0)
    close(lambdas, expected)
    advantages, returns = decoupled_gae(*arguments, 0.95, lambdas)
    for s, of_rollout in enumerate(expected):
        alone = tuple(argument[s : s + 1] for argument in arguments)
        close(advantages[s : s + 1], slow_gae(*alone, 0.95, of_rollout)[0])
        close(returns[s : s + 1], slow_gae(*alone, 0.95, 1.0)[1])


def test_lambdas_by_length_of_examples_worked_by_hand():
    mask = torch.zeros(3, 100, dtype=torch.bool)
    mask[0], mask[1, :20] = True, True  # alpha l is 5, 1 and 0
    close(length_adaptive_lambda(mask, 0.05), [0.8, 0.0, 0.0])
    for alpha in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="alpha"):
            length_adaptive_lambda(mask, alpha)


def turns_of(row):
    """Returns the positions of each turn of a rollout: runs of actions."""
    turns, open_turn = [], False
    for t, is_action in enumerate(row):
        if is_action and not open_turn:
            turns.append([])
        if is_action:
            turns[-1].append(t)
        open_turn = is_action
    return turns


@pytest.mark.parametrize("gae_lambda", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_gae_over_turns_equals_a_loop_over_turns(seed, gae_lambda):
    arguments = random_arguments(seed)
    rewards, values, mask, last_values, truncated = arguments
    turns = Turns.of(rewards, values, mask)
    estimates = gae(turns.rewards_SK, turns.values_SK, turns.mask_SK, last_values, truncated, 0.9, gae_lambda)
    expected = torch.zeros(mask.shape, dtype=torch.float64), torch.zeros(mask.shape, dtype=torch.float64)
    for s, row in enumerate(mask.tolist()):
        of_turns = turns_of(row)
        r = [sum(rewards[s, t].item() for t in turn) for turn in of_turns]
        v = [values[s, turn[0]].item() for turn in of_turns] + [last_values[s].item() if truncated[s] else 0.0]
        delta = [r[k] + 0.9 * v[k + 1] - v[k] for k in range(len(of_turns))]
        for k, turn in enumerate(of_turns):
            advantage = sum((0.9 * gae_lambda) ** (j - k) * delta[j] for j in range(k, len(of_turns)))
            for t in turn:
                expected[0][s, t], expected[1][s, t] = advantage, advantage + v[k]
    for estimate, wanted in zip(estimates, expected, strict=True):
        close(turns.of_tokens(estimate), wanted)


def test_turns_of_an_example_worked_by_hand():
    # Two turns with a tool's output of two tokens between them, and padding.
    mask = torch.tensor([[1, 1, 0, 0, 1, 0], [0, 1, 1, 0, 0, 0]]).bool()
    assert turn_numbers(mask)[0, :5].tolist() == [0, 0, 0, 0, 1]
    assert turn_numbers(mask)[1, 1:3].tolist() == [0, 0]
    close(turn_rewards([[2.0, 3.0], [4.0]], mask), [[0, 2.0, 0, 0, 3.0, 0], [0, 0, 4.0, 0, 0, 0]])
    values = torch.tensor([[0.5, 9.0, 9.0, 9.0, 1.0, 9.0], [9.0, 4.0, 9.0, 9.0, 9.0, 9.0]])
    turns = Turns.of(turn_rewards([[2.0, 3.0], [4.0]], mask), values, mask)
    # delta_1 = 3 - 1 = 2, delta_0 = 2 + 1 - 0.5 = 2.5; with lambda 0.5, A_0 = 2.5 + 0.5 * 2 = 3.5
    ends = torch.zeros(2), torch.zeros(2, dtype=torch.bool)
    advantages, returns = gae(turns.rewards_SK, turns.values_SK, turns.mask_SK, *ends, 1.0, 0.5)
    close(turns.of_tokens(advantages), [[3.5, 3.5, 0, 0, 2.0, 0], [0] * 6])
    close(turns.of_tokens(returns), [[4.0, 4.0, 0, 0, 3.0, 0], [0, 4.0, 4.0, 0, 0, 0]])


def test_a_rollout_needs_one_reward_for_each_turn():
    mask = torch.tensor([[True, False, True], [True, True, True]])
    with pytest.raises(ValueError, match="rollout 1: 2 rewards of turns, but 1 turns"):
        turn_rewards([[1.0, 2.0], [1.0, 2.0]], mask)


def test_no_tokens_have_no_turns():
    empty = torch.zeros(3, 0)
    turns = Turns.of(empty, empty, empty.bool())
    assert turns.of_tokens(turns.rewards_SK).shape == (3, 0)
    none = torch.zeros(2, 4)
    assert not Turns.of(none, none, none.bool()).of_tokens(torch.zeros(2, 0)).any()


@pytest.mark.parametrize("kind", ["rloo", "grpo"])
@pytest.mark.parametrize("seed", SEEDS)
def test_advantages_in_a_group_equal_a_loop_over_groups(seed, kind):
    rng = random.Random(seed)
    groups = [7, 7, 3, 3, 3, 9, 9, 9, 9]
    rng.shuffle(groups)
    scores = [rng.gauss(1.0, 2.0) for _ in groups]
    expected = []
    for s, group in enumerate(groups):
        others = [scores[i] for i, other in enumerate(groups) if other == group and i != s]
        everyone = [*others, scores[s]]
        mean = sum(everyone) / len(everyone)
        deviation = math.sqrt(sum((score - mean) ** 2 for score in everyone) / (len(everyone) - 1))
        rloo = scores[s] - sum(others) / len(others)
        expected.append(rloo if kind == "rloo" else (scores[s] - mean) / (deviation + 1e-6))
    close(group_advantages(torch.tensor(scores), np.array(groups), kind), expected, 1e-5)


def test_a_group_of_equal_scores_has_no_advantage_and_a_group_of_one_is_refused():
    for kind in ("rloo", "grpo"):
        close(group_advantages(torch.full((4,), 0.1), np.array([0, 0, 1, 1]), kind), [0.0] * 4)
        with pytest.raises(ValueError, match="rollout 2 is the only one of its prompt"):
            group_advantages(torch.zeros(3), np.array([0, 0, 1]), kind)
    with pytest.raises(ValueError, match="'mean'"):
        group_advantages(torch.zeros(2), np.array([0, 0]), "mean")
