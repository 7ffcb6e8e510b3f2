"""Values and rewards of actions equal slow computations from their definitions: plain loops in float64."""

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
    estimate_kl,
    masked_mean,
    pad_rows,
    shaped_rewards,
    whiten,
)
from rlhf_critic.errors import NonFiniteRewardError
from tests.rlhf_critic.algorithms.definitions import (
    SEEDS,
    close,
    masked_numbers,
    random_like,
    random_mask,
    slow_moments,
)

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


# --- statistics over tokens ---


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


@pytest.mark.parametrize("seed", SEEDS)
def test_rewards_of_tokens_add_to_those_of_rollouts(seed):
    torch.manual_seed(seed)
    mask = random_mask(random.Random(seed))
    rewards, kl, of_tokens = torch.randn(mask.shape[0]), random_like(mask), random_like(mask)
    without = shaped_rewards(rewards, kl, mask, 0.1)
    expected = torch.zeros(mask.shape, dtype=torch.float64)
    for s in range(mask.shape[0]):
        for t in range(mask.shape[1]):
            if mask[s, t]:
                expected[s, t] = without[s, t].item() + of_tokens[s, t].item()
    close(shaped_rewards(rewards, kl, mask, 0.1, of_tokens), expected)
