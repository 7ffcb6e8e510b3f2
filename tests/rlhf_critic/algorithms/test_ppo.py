"""Every function of PPO equals a slow computation from its definition: plain loops over plain numbers, in float64."""

import dataclasses
import json
import math
import random

import numpy as np
import pytest
import torch

from rlhf_critic.algorithms.ppo import (
    RunningMoments,
    action_values,
    clip_rewards,
    clipped_policy_loss,
    clipped_value_loss,
    estimate_kl,
    explained_variance,
    gae,
    masked_mean,
    pad_rows,
    shaped_rewards,
    whiten,
)
from rlhf_critic.errors import NonFiniteRewardError

SEEDS = range(5)


def close(actual, expected, tolerance=1e-6):
    assert actual.dtype == torch.float32
    torch.testing.assert_close(
        actual.double(), torch.as_tensor(expected, dtype=torch.float64), rtol=tolerance, atol=tolerance, equal_nan=True
    )


def random_mask(generator):
    """Makes rollouts of many lengths: full, one action, none; some with holes, also at either end."""
    longest = generator.randint(2, 12)
    lengths = [longest, 1, 0, *(generator.randint(0, longest) for _ in range(9))]
    mask = torch.zeros(len(lengths), longest, dtype=torch.bool)
    for row, length in enumerate(lengths):
        holes = row > 4
        for t in range(length):
            mask[row, t] = not (holes and generator.random() < 0.4)
    return mask


def random_like(mask, scale=1.0):
    """Makes random numbers with NaN at every entry that must not be read."""
    return (scale * torch.randn(mask.shape)).masked_fill(~mask, math.nan)


def masked_numbers(x, mask):
    return [x[s, t].item() for s in range(x.shape[0]) for t in range(x.shape[1]) if mask[s, t]]


# --- alignment ---


def test_values_of_actions_are_those_of_the_token_before_and_the_last_one_is_after_all():
    # tokens:         a    b    c  |  x    y          a prompt of three and a response of two
    first = np.array([0.1, 0.2, 0.3, 0.4, 0.5], dtype=np.float32)
    # tokens:          a  |  x    y    z              a prompt of one
    second = np.array([1.1, 1.2, 1.3, 1.4], dtype=np.float32)
    # tokens:         a    b  |                       an empty response
    third = np.array([2.1, 2.2], dtype=np.float32)
    actions, last = action_values([first, second, third], [3, 1, 2])
    # x is sampled after c (0.3), y after x (0.4); the value after y is 0.5
    np.testing.assert_array_equal(actions[0], np.array([0.3, 0.4], dtype=np.float32))
    np.testing.assert_array_equal(actions[1], np.array([1.1, 1.2, 1.3], dtype=np.float32))
    assert actions[2].shape == (0,)
    np.testing.assert_array_equal(last, np.array([0.5, 1.4, 2.2], dtype=np.float32))
    assert last.dtype == np.float32
    assert all(values.dtype == np.float32 for values in actions)


def test_no_rollouts_have_no_values():
    actions, last = action_values([], [])
    assert actions == []
    assert last.shape == (0,)


@pytest.mark.parametrize("prompt_length", [-1, 0, 4])
def test_a_prompt_that_cannot_be_is_refused_with_its_rollout(prompt_length):
    sequences = [np.zeros(3, dtype=np.float32), np.zeros(3, dtype=np.float32)]
    with pytest.raises(ValueError, match=f"rollout 1: a prompt of {prompt_length} tokens in a sequence of 3"):
        action_values(sequences, [3, prompt_length])


def test_every_sequence_needs_a_prompt_length():
    with pytest.raises(ValueError, match=r"\(2,\), \(1,\)"):
        action_values([np.zeros(3, dtype=np.float32)] * 2, [1])


# --- padding ---


@pytest.mark.filterwarnings("error")
def test_rows_of_any_kind_are_padded_on_the_right():
    read_only = np.array([4.0, 5.0], dtype=np.float32)
    read_only.setflags(write=False)
    padded, mask = pad_rows([[1.0, 2.0, 3.0], read_only, torch.tensor([6.5], dtype=torch.bfloat16), []])
    close(padded, [[1.0, 2.0, 3.0], [4.0, 5.0, 0.0], [6.5, 0.0, 0.0], [0.0, 0.0, 0.0]])
    assert mask.tolist() == [[True] * 3, [True, True, False], [True, False, False], [False] * 3]


def test_all_rows_may_be_empty():
    padded, mask = pad_rows([[], np.zeros(0)])
    assert padded.shape == mask.shape == (2, 0)
    assert padded.dtype == torch.float32
    assert mask.dtype == torch.bool


def test_what_is_not_rows_of_numbers_is_refused():
    with pytest.raises(ValueError, match="no rows"):
        pad_rows([])
    with pytest.raises(ValueError, match=r"row 1 .*\(1, 2\)"):
        pad_rows([[1.0], [[1.0, 2.0]]])


def test_padded_rows_do_not_share_memory_with_the_rows():
    row = torch.tensor([1.0, 2.0])
    array = np.array([1.0, 2.0], dtype=np.float32)
    for one in (row, array):
        padded, _ = pad_rows([one])
        padded.zero_()
    assert row.tolist() == array.tolist() == [1.0, 2.0]


# --- KL divergence and rewards ---


@pytest.mark.parametrize("seed", SEEDS)
def test_kl_estimators_equal_their_definitions(seed):
    torch.manual_seed(seed)
    log_probs, ref_log_probs = -torch.rand(4, 7) * 3, -torch.rand(4, 7) * 3
    for kind, definition in {
        "k1": lambda ratio: -math.log(ratio),
        "k2": lambda ratio: math.log(ratio) ** 2 / 2,
        "k3": lambda ratio: (ratio - 1) - math.log(ratio),
    }.items():
        expected = [
            [
                definition(math.exp(ref_log_probs[s, t].item()) / math.exp(log_probs[s, t].item()))
                for t in range(log_probs.shape[1])
            ]
            for s in range(log_probs.shape[0])
        ]
        close(estimate_kl(log_probs, ref_log_probs, kind), expected)


def test_k1_and_k3_average_to_the_divergence_itself():
    policy, reference = [0.5, 0.3, 0.2], [0.2, 0.2, 0.6]
    divergence = sum(p * math.log(p / q) for p, q in zip(policy, reference, strict=True))
    log_policy, log_reference = torch.tensor([policy]).log(), torch.tensor([reference]).log()
    for kind in ("k1", "k3"):
        estimates = estimate_kl(log_policy, log_reference, kind)
        assert (torch.tensor([policy]) * estimates).sum().item() == pytest.approx(divergence, rel=1e-5)


def test_k3_keeps_its_digits_where_policies_are_nearly_the_same():
    small = torch.tensor([[1e-4]])
    # exp(d) - 1 - d is d^2 / 2 + d^3 / 6 + ...; the naive formula gives 0 in fp32
    assert estimate_kl(torch.zeros(1, 1), small, "k3").item() == pytest.approx(5e-9, rel=0.02)


def test_an_unknown_kl_estimator_is_refused():
    with pytest.raises(ValueError, match="'k4'"):
        estimate_kl(torch.zeros(1, 1), torch.zeros(1, 1), "k4")


@pytest.mark.parametrize("seed", SEEDS)
def test_shaped_rewards_equal_a_loop_over_actions(seed):
    torch.manual_seed(seed)
    mask = random_mask(random.Random(seed))
    rewards, kl = torch.randn(mask.shape[0]), random_like(mask)
    expected = torch.zeros(mask.shape, dtype=torch.float64)
    for s in range(mask.shape[0]):
        actions = [t for t in range(mask.shape[1]) if mask[s, t]]
        for t in actions:
            expected[s, t] = -0.1 * kl[s, t].item() + (rewards[s].item() if t == actions[-1] else 0.0)
    close(shaped_rewards(rewards, kl, mask, 0.1), expected)


def test_shaped_rewards_of_no_tokens_are_none():
    empty = torch.zeros(2, 0)
    assert shaped_rewards(torch.ones(2), empty, empty.bool(), 0.1).shape == (2, 0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "function",
    [
        lambda rewards: shaped_rewards(rewards, torch.zeros(4, 2), torch.ones(4, 2, dtype=torch.bool), 0.1),
        lambda rewards: clip_rewards(rewards, 5.0),
        lambda rewards: RunningMoments().updated(rewards),
    ],
    ids=["shaped_rewards", "clip_rewards", "RunningMoments"],
)
def test_a_reward_that_is_no_number_is_an_error_that_names_its_rollout(function, bad):
    with pytest.raises(NonFiniteRewardError, match=r"2 of 4 rewards .* rollouts 1, 3 "):
        function(torch.tensor([0.0, bad, 1.0, bad]))


def test_a_batch_of_bad_rewards_does_not_flood_the_message():
    with pytest.raises(NonFiniteRewardError, match=r"14, 15 and 84 more"):
        clip_rewards(torch.full((100,), math.nan), 1.0)


def test_rewards_are_clipped_on_both_sides():
    close(clip_rewards(torch.tensor([-7.0, -5.0, 0.5, 6.0]), 5.0), [-5.0, -5.0, 0.5, 5.0])
    with pytest.raises(ValueError, match="positive"):
        clip_rewards(torch.zeros(1), 0.0)


# --- advantages ---


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


# --- statistics over tokens ---


def slow_moments(numbers):
    mean = sum(numbers) / len(numbers)
    return mean, sum((x - mean) ** 2 for x in numbers) / len(numbers)


@pytest.mark.parametrize("seed", SEEDS)
def test_whiten_equals_its_definition(seed):
    torch.manual_seed(seed)
    mask = random_mask(random.Random(seed))
    x = random_like(mask, scale=3.0) + 2.0
    mean, variance = slow_moments(masked_numbers(x, mask))
    expected = torch.zeros(mask.shape, dtype=torch.float64)
    for s in range(mask.shape[0]):
        for t in range(mask.shape[1]):
            if mask[s, t]:
                expected[s, t] = (x[s, t].item() - mean) / math.sqrt(variance + 1e-8)
    close(whiten(x, mask), expected)


def test_whiten_of_one_number_of_none_and_of_equal_ones_is_finite():
    x = torch.full((2, 500), 100.1)
    none, one = torch.zeros(2, 500, dtype=torch.bool), torch.zeros(2, 500, dtype=torch.bool)
    one[1, 2] = True
    for mask in (none, one, ~none):
        close(whiten(x, mask), torch.zeros(2, 500))
    # In fp32 these numbers are equal; whitening must not amplify differences below fp32 precision.
    close(whiten(torch.tensor([[0.1, 0.1 + 1e-10]], dtype=torch.float64), torch.ones(1, 2).bool()), torch.zeros(1, 2))
    assert whiten(torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.bool)).shape == (2, 0)


@pytest.mark.parametrize("seed", SEEDS)
def test_masked_mean_equals_its_definition(seed):
    torch.manual_seed(seed)
    mask = random_mask(random.Random(seed))
    x = random_like(mask).requires_grad_()
    mean = masked_mean(x, mask)
    close(mean, slow_moments(masked_numbers(x, mask))[0])
    mean.backward()
    close(x.grad, mask / mask.sum())


def test_masked_mean_of_nothing_is_0():
    close(masked_mean(torch.full((2, 2), math.nan), torch.zeros(2, 2, dtype=torch.bool)), 0.0)
    close(masked_mean(torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.bool)), 0.0)


@pytest.mark.parametrize("seed", SEEDS)
def test_explained_variance_equals_its_definition(seed):
    torch.manual_seed(seed)
    mask = random_mask(random.Random(seed))
    returns = random_like(mask)
    values = returns + random_like(mask, scale=0.5) + 1.0
    _, variance = slow_moments(masked_numbers(returns, mask))
    _, residual = slow_moments(masked_numbers(returns.double() - values.double(), mask))
    close(explained_variance(values, returns, mask), 1 - residual / variance)
    close(explained_variance(returns, returns, mask), 1.0)
    close(explained_variance(torch.zeros(mask.shape), returns, mask), 0.0)


def test_explained_variance_is_nan_where_returns_do_not_vary():
    mask = torch.ones(3, 100, dtype=torch.bool)
    # 0.1 is not a sum of powers of two, so a mean in fp32 would be inexact and the variance not 0
    assert explained_variance(torch.randn(3, 100), torch.full((3, 100), 0.1), mask).isnan()
    assert explained_variance(torch.randn(3, 100), torch.randn(3, 100), ~mask).isnan()
    assert explained_variance(torch.zeros(2, 0), torch.zeros(2, 0), torch.zeros(2, 0).bool()).isnan()


# --- running moments ---


@pytest.mark.parametrize("seed", SEEDS)
def test_running_moments_of_parts_equal_those_of_the_whole(seed):
    torch.manual_seed(seed)
    parts = [1000.0 + torch.randn(size) for size in (1, 5, 0, 1, 30, 2)]
    moments = RunningMoments()
    for number, part in enumerate(parts):
        moments = moments.updated(part)
        rewards = torch.cat(parts[: number + 1]).tolist()
        mean = math.fsum(rewards) / len(rewards)
        squares = math.fsum((x - mean) ** 2 for x in rewards)
        assert moments.count == len(rewards)
        assert moments.mean == pytest.approx(mean, rel=1e-12)
        assert moments.squares == pytest.approx(squares, rel=1e-9)
        assert moments.std == pytest.approx(math.sqrt(squares / (len(rewards) - 1)) if len(rewards) > 1 else 1.0)


def test_running_moments_without_spread_scale_by_1():
    assert RunningMoments().std == 1.0
    assert RunningMoments().updated(torch.tensor([7.0])).std == 1.0
    assert RunningMoments().updated(torch.tensor([1.0, 3.0])).std == pytest.approx(math.sqrt(2.0))
    moments = RunningMoments()
    for dtype in (torch.float32, torch.float64):
        for size in (3, 10, 7):
            moments = moments.updated(torch.full((size,), 0.1, dtype=dtype))
        assert moments.std == 1.0


@pytest.mark.parametrize("level", [0.0, 0.5, -3.0, 1000.0])
@pytest.mark.parametrize("spread", [0.0, 1e-30, 1e-8, 1e-5, 1e-3, 1.0])
def test_scaled_rewards_have_a_bound(level, spread):
    """Rewards that differ in their last digit only, which scorers' batches decide, are not blown up."""
    rewards = (level + spread * torch.tensor([0.0, 0.0, 1.0, -1.0], dtype=torch.float64)).float()
    scaled = rewards / RunningMoments().updated(rewards).std
    assert (scaled.abs() <= rewards.abs().clamp(max=1e6) * 1e4).all()
    assert RunningMoments().updated(torch.tensor([0.5, 0.5, 0.50000006, 0.5])).std == 1.0


def test_running_moments_survive_json_and_cannot_be_changed():
    moments = RunningMoments().updated(torch.tensor([1.0, 2.0, 4.0], dtype=torch.bfloat16))
    assert RunningMoments(**json.loads(json.dumps(dataclasses.asdict(moments)))) == moments
    assert all(type(number) is float for number in dataclasses.astuple(moments))
    with pytest.raises(dataclasses.FrozenInstanceError):
        moments.count = 0.0


# --- losses ---


def slow_value_loss(value, old_value, target, clip):
    """Computes the loss of one token from float64 scalars with gradients, and whether the clipped term counts."""
    square = (value - target) ** 2
    if clip is None:
        return square / 2, False
    near = min(max(value, old_value - clip), old_value + clip)
    near_square = (near - target) ** 2
    return max(square, near_square) / 2, bool(near_square > square)


def slow_policy_loss(log_prob, old_log_prob, advantage, clip):
    ratio = torch.exp(log_prob - old_log_prob)
    near = min(max(ratio, torch.tensor(1.0 - clip)), torch.tensor(1.0 + clip))
    return max(-advantage * ratio, -advantage * near), bool(-advantage * near > -advantage * ratio)


@pytest.mark.parametrize("shape", [(40,), (6, 9), (2, 3, 4), (), (3, 0)])
@pytest.mark.parametrize(
    ("loss_of", "slow_loss_of", "clip"),
    [
        (clipped_value_loss, slow_value_loss, 0.2),
        (clipped_value_loss, slow_value_loss, None),
        (clipped_policy_loss, slow_policy_loss, 0.2),
    ],
)
def test_clipped_losses_and_their_gradients_equal_a_loop_over_tokens(loss_of, slow_loss_of, clip, shape):
    torch.manual_seed(0)
    old = -torch.rand(shape)
    new = (old + 0.4 * torch.randn(shape)).requires_grad_()
    target = torch.randn(shape)
    loss, clipped = loss_of(new, old, target, clip)
    exact = new.detach().double().requires_grad_()
    triples = zip(exact.flatten(), old.double().flatten(), target.double().flatten(), strict=True)
    expected = [slow_loss_of(*triple, clip) for triple in triples]
    assert loss.shape == clipped.shape == shape
    close(loss.detach().flatten(), [one.item() for one, _ in expected])
    assert clipped.dtype == torch.bool
    assert clipped.flatten().tolist() == [was_clipped for _, was_clipped in expected]
    if not expected:
        return
    if clip is not None and loss.numel() > 1:
        assert clipped.any(), "the example does not clip"
        assert not clipped.all(), "the example only clips"
    loss.sum().backward()
    sum(one for one, _ in expected).backward()
    close(new.grad, exact.grad)
    assert not new.grad[clipped].any()


def test_clipped_losses_of_examples_worked_by_hand():
    # The value moved from 0 to 1 and may move by 0.5. Towards the return 3 it is held at 0.5: (0.5 - 3)^2 / 2 = 3.125.
    # Away from the return -3 the full distance counts: (1 + 3)^2 / 2 = 8.
    values, old_values, returns = torch.ones(2), torch.zeros(2), torch.tensor([3.0, -3.0])
    loss, clipped = clipped_value_loss(values, old_values, returns, 0.5)
    close(loss, [3.125, 8.0])
    assert clipped.tolist() == [True, False]
    loss, clipped = clipped_value_loss(values, old_values, returns, None)
    close(loss, [2.0, 8.0])
    assert clipped.tolist() == [False, False]
    # The ratio is 2 or 1/2 and may be 0.8 to 1.2; the advantage is 3 or -3.
    log_probs = torch.tensor([math.log(2), math.log(2), -math.log(2), -math.log(2)])
    loss, clipped = clipped_policy_loss(log_probs, torch.zeros(4), torch.tensor([3.0, -3.0, 3.0, -3.0]), 0.2)
    close(loss, [-3.6, 6.0, -1.5, 2.4])
    assert clipped.tolist() == [True, False, False, True]


def test_the_first_step_on_new_rollouts_is_the_plain_gradient():
    # Both terms are equal there, and no part of the gradient may disappear.
    log_probs = torch.tensor([-0.3, -1.7, -2.0], requires_grad=True)
    advantages = torch.tensor([2.0, -1.0, 0.0])
    loss, clipped = clipped_policy_loss(log_probs, log_probs.detach(), advantages, 0.2)
    loss.sum().backward()
    close(log_probs.grad, -advantages)
    values = torch.tensor([1000.1, -0.3], requires_grad=True)
    loss, values_clipped = clipped_value_loss(values, values.detach(), torch.tensor([999.0, 1.0]), 0.2)
    loss.sum().backward()
    close(values.grad, values.detach() - torch.tensor([999.0, 1.0]))
    assert not clipped.any()
    assert not values_clipped.any()


def test_rounding_does_not_count_as_clipping():
    # Within the range, although old + (new - old) differs from new in fp32.
    values, old_values = 0.1 + torch.rand(1000), 1000.0 + torch.rand(1000)
    _, clipped = clipped_value_loss(values, old_values, torch.zeros(1000), 2000.0)
    assert not clipped.any()


def test_a_clipped_ratio_that_overflows_has_no_gradient():
    log_probs = torch.tensor([0.0, 0.0, -1000.0], requires_grad=True)
    old_log_probs = torch.tensor([-1000.0, -1000.0, 0.0])
    loss, clipped = clipped_policy_loss(log_probs, old_log_probs, torch.tensor([1.0, 0.0, -1.0]), 0.2)
    close(loss.detach(), [-1.2, 0.0, 0.8])
    assert clipped.tolist() == [True, False, True], "without an advantage there is nothing to clip"
    loss.sum().backward()
    assert log_probs.grad.tolist() == [0.0, 0.0, 0.0]


def test_clips_that_mean_nothing_are_refused():
    x = torch.zeros(1)
    for clip in (0.0, -0.2, math.nan):
        with pytest.raises(ValueError, match="clip"):
            clipped_value_loss(x, x, x, clip)
    for clip in (0.0, -0.2, 1.0, math.nan):
        with pytest.raises(ValueError, match="clip"):
            clipped_policy_loss(x, x, x, clip)


# --- properties of all functions ---

MASK = torch.tensor([[True, True, False], [True, False, True]])
ROW, TOKENS = torch.tensor([True, False]), torch.ones(2, 3)
CALLS = {
    "estimate_kl": (lambda a, b: estimate_kl(a, b, "k3"), (TOKENS, TOKENS)),
    "shaped_rewards": (lambda r, kl, m: shaped_rewards(r, kl, m, 0.1), (torch.ones(2), TOKENS, MASK)),
    "clip_rewards": (lambda r: clip_rewards(r, 0.5), (torch.ones(2),)),
    "gae": (lambda r, v, m, last, cut: gae(r, v, m, last, cut, 0.9, 0.9), (TOKENS, TOKENS, MASK, torch.ones(2), ROW)),
    "masked_mean": (masked_mean, (TOKENS, MASK)),
    "whiten": (whiten, (TOKENS, MASK)),
    "explained_variance": (explained_variance, (TOKENS, TOKENS, MASK)),
    "clipped_value_loss": (lambda v, old, r: clipped_value_loss(v, old, r, 0.2), (TOKENS, TOKENS, TOKENS)),
    "clipped_policy_loss": (lambda p, old, a: clipped_policy_loss(p, old, a, 0.2), (TOKENS, TOKENS, TOKENS)),
}


def random_arguments(templates):
    return [template if template.dtype == torch.bool else torch.randn(template.shape) for template in templates]


def results(call, arguments):
    result = call(*arguments)
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", CALLS)
def test_any_input_is_computed_in_fp32(name, dtype):
    torch.manual_seed(0)
    call, templates = CALLS[name]
    given = [x if x.dtype == torch.bool else x.to(dtype) for x in random_arguments(templates)]
    cast = [x if x.dtype == torch.bool else x.float() for x in given]
    for actual, expected in zip(results(call, given), results(call, cast), strict=True):
        assert actual.dtype in (torch.float32, torch.bool)
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", CALLS)
def test_arguments_stay_as_they_are(name):
    torch.manual_seed(0)
    call, templates = CALLS[name]
    arguments = random_arguments(templates)
    before = [x.clone() for x in arguments]
    for result in results(call, arguments):
        result.zero_()  # the result shares no memory with them
    assert all(torch.equal(x, y) for x, y in zip(arguments, before, strict=True))


@pytest.mark.parametrize(
    ("name", "place"),
    [(name, place) for name, (_, templates) in CALLS.items() for place in range(len(templates)) if len(templates) > 1],
)
def test_shapes_that_differ_are_refused_with_both(name, place):
    call, templates = CALLS[name]
    arguments = list(templates)
    # One row would broadcast and give wrong numbers.
    arguments[place] = arguments[place][:1]
    # The message contains both shapes, or both numbers of rows if a row has one number.
    with pytest.raises(ValueError, match=r"differ in shape: (\(1,.*\), \(2,.*\)|\(2,.*\), \(1,.*\))"):
        call(*arguments)
