"""PPO targets equal a slow computation from the definitions; minibatches contain every rollout once.

Knows the definitions; knows nothing of models.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from rlhf_critic.algorithms.advantages import RolloutBatch, compute_advantages, minibatch_rows
from rlhf_critic.algorithms.ppo import RunningMoments
from rlhf_critic.config.ppo import AlgorithmConfig, RewardConfig
from rlhf_critic.errors import DivergedError, NonFiniteRewardError

PLAIN = AlgorithmConfig(gamma=1.0, gae_lambda=1.0, kl_coefficient=0.0, whiten_advantages=False)
EARLIER = RunningMoments().updated(torch.tensor([3.0, -1.0, 0.5]))


def floats(*numbers: float) -> np.ndarray:
    return np.array(numbers, dtype=np.float32)


def two_rollouts() -> RolloutBatch:
    """Makes a terminated response of two tokens and a truncated response of one token."""
    return RolloutBatch(
        prompt_lengths=[2, 1],
        truncated_S=np.array([False, True]),
        rewards_S=floats(1.0, 3.0),
        log_probs=[floats(-1.0, -2.0), floats(-0.5)],
        ref_log_probs=[floats(-1.5, -1.0), floats(-0.5)],
        values=[floats(9.0, 0.25, 0.5, 7.0), floats(2.0, 4.0)],
    )


def random_rollouts(seed: int, empty: bool = False) -> RolloutBatch:
    """Makes rollouts of every length. Some are truncated and, on request, some have no token."""
    rng = np.random.default_rng(seed)
    prompt_lengths = rng.integers(1, 4, 9).tolist()
    lengths = rng.integers(1, 6, 9).tolist()
    if empty:
        lengths[0] = lengths[4] = 0
    numbers = [[rng.normal(size=length).astype(np.float32) for length in lengths] for _ in range(2)]
    totals = [p + r for p, r in zip(prompt_lengths, lengths, strict=True)]
    return RolloutBatch(
        prompt_lengths=prompt_lengths,
        truncated_S=rng.random(9) < 0.4,
        rewards_S=(3 * rng.normal(size=9)).astype(np.float32),
        log_probs=numbers[0],
        ref_log_probs=numbers[1],
        values=[rng.normal(size=total).astype(np.float32) for total in totals],
    )


def slow_experience(judged: RolloutBatch, algorithm: AlgorithmConfig, reward: RewardConfig, earlier: list[float]):
    """Computes advantages, returns and values of the actions by loops over tokens, in Python floats."""
    rewards = [
        float(r) - (reward.missing_eos_penalty if cut else 0.0)
        for r, cut in zip(judged.rewards_S, judged.truncated_S, strict=True)
    ]
    bootstrapped = judged.truncated_S & algorithm.bootstrap_truncated
    seen = [*earlier, *(r for r, unscored in zip(rewards, bootstrapped, strict=True) if not unscored)]
    if reward.scaling == "running":
        mean = sum(seen) / len(seen)
        spread = math.sqrt(sum((r - mean) ** 2 for r in seen) / (len(seen) - 1))
        rewards = [r / spread for r in rewards]
    if reward.clip is not None:
        rewards = [max(-reward.clip, min(reward.clip, r)) for r in rewards]
    advantages, returns, old_values = [], [], []
    for s, prompt_length in enumerate(judged.prompt_lengths):
        response = len(judged.log_probs[s])
        values = [float(judged.values[s][prompt_length - 1 + t]) for t in range(response)]
        goes_on = bool(judged.truncated_S[s]) and algorithm.bootstrap_truncated
        of_tokens = []
        for t in range(response):
            log_ratio = float(judged.log_probs[s][t]) - float(judged.ref_log_probs[s][t])
            kl = {"k1": log_ratio, "k2": log_ratio**2 / 2, "k3": math.exp(-log_ratio) - 1 + log_ratio}
            of_tokens.append(-algorithm.kl_coefficient * kl[algorithm.kl_estimator])
        if response and not goes_on:
            of_tokens[-1] += rewards[s]
        row = []
        for t in range(response):  # definition of GAE: a sum over all later temporal differences
            total = 0.0
            for later in range(t, response):
                is_last = later == response - 1
                following = (float(judged.values[s][-1]) if goes_on else 0.0) if is_last else values[later + 1]
                delta = of_tokens[later] + algorithm.gamma * following - values[later]
                total += (algorithm.gamma * algorithm.gae_lambda) ** (later - t) * delta
            row.append(total)
        advantages.append(row)
        returns.append([a + v for a, v in zip(row, values, strict=True)])
        old_values.append(values)
    if algorithm.whiten_advantages:
        everything = [a for row in advantages for a in row]
        mean = sum(everything) / len(everything)
        variance = sum((a - mean) ** 2 for a in everything) / len(everything)
        advantages = [[(a - mean) / math.sqrt(variance + 1e-8) for a in row] for row in advantages]
    return advantages, returns, old_values


def assert_rows(rows, expected):
    assert [len(row) for row in rows] == [len(row) for row in expected]
    for row, wanted in zip(rows, expected, strict=True):
        np.testing.assert_allclose(row, wanted, rtol=1e-4, atol=1e-5)


def test_two_rollouts_by_hand():
    made = compute_advantages(two_rollouts(), PLAIN, RewardConfig(), RunningMoments())
    assert_rows(made.old_values, [[0.25, 0.5], [2.0]])
    assert_rows(made.returns, [[1.0, 1.0], [3.0]])
    assert_rows(made.advantages, [[0.75, 0.5], [1.0]])
    assert made.metrics["reward"] == 2.0
    assert made.metrics["reward_std"] == 1.0
    assert made.metrics["kl"] == pytest.approx((0.5 - 1.0 + 0.0) / 2)
    assert made.metrics["kl_per_token"] == pytest.approx(-0.5 / 3)
    assert made.metrics["value"] == pytest.approx(2.75 / 3)
    assert made.metrics["return"] == pytest.approx(5 / 3)
    assert made.metrics["response_tokens"] == 1.5
    assert made.metrics["truncated"] == 0.5
    assert (made.moments.count, made.moments.mean) == (2.0, 2.0)


def test_kl_costs_at_every_token_by_hand():
    made = compute_advantages(
        two_rollouts(), PLAIN.model_copy(update={"kl_coefficient": 0.1}), RewardConfig(), RunningMoments()
    )
    assert_rows(made.returns, [[1.0 - 0.05 + 0.1, 1.0 + 0.1], [3.0]])


def test_a_cut_response_goes_on_with_the_critics_value_or_is_judged_by_hand():
    goes_on = PLAIN.model_copy(update={"bootstrap_truncated": True})
    assert_rows(
        compute_advantages(two_rollouts(), goes_on, RewardConfig(), RunningMoments()).returns, [[1.0, 1.0], [4.0]]
    )
    penalty = RewardConfig(missing_eos_penalty=2.5)
    assert_rows(compute_advantages(two_rollouts(), PLAIN, penalty, RunningMoments()).returns, [[1.0, 1.0], [0.5]])


def test_rewards_are_scaled_by_all_of_the_run_and_then_clipped_by_hand():
    earlier = RunningMoments().updated(torch.tensor([0.0, 8.0]))  # with 1 and 3: mean 3, squares 9 + 25 + 4 + 0
    reward = RewardConfig(scaling="running", clip=0.5)
    spread = math.sqrt(38 / 3)
    made = compute_advantages(two_rollouts(), PLAIN, reward, earlier)
    assert_rows(made.returns, [[1 / spread] * 2, [0.5]])
    assert made.metrics["reward"] == 2.0, "metrics show rewards as they were given"
    assert made.moments.count == 4.0


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("bootstrap", [False, True])
@pytest.mark.parametrize(
    "reward",
    [
        RewardConfig(),
        RewardConfig(missing_eos_penalty=1.5),
        RewardConfig(scaling="running"),
        RewardConfig(clip=0.7),
        RewardConfig(missing_eos_penalty=1.5, scaling="running", clip=0.7),
    ],
    ids=["as given", "penalty", "scaled", "clipped", "all"],
)
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_equals_loops_over_tokens(reward, bootstrap, whiten, empty, estimator):
    algorithm = AlgorithmConfig(
        gamma=0.9,
        gae_lambda=0.8,
        kl_coefficient=0.3,
        kl_estimator=estimator,
        bootstrap_truncated=bootstrap,
        whiten_advantages=whiten,
    )
    judged = random_rollouts(seed=3, empty=empty)
    assert judged.truncated_S.any()
    assert not judged.truncated_S.all()
    made = compute_advantages(judged, algorithm, reward, EARLIER)
    advantages, returns, old_values = slow_experience(judged, algorithm, reward, [3.0, -1.0, 0.5])
    assert_rows(made.advantages, advantages)
    assert_rows(made.returns, returns)
    assert_rows(made.old_values, old_values)


def test_an_explained_variance_that_is_not_defined_is_left_out():
    alone = replace(two_rollouts(), rewards_S=floats(1.0, 1.0))
    assert "explained_variance" not in compute_advantages(alone, PLAIN, RewardConfig(), RunningMoments()).metrics
    several = compute_advantages(two_rollouts(), PLAIN, RewardConfig(), RunningMoments()).metrics
    assert all(math.isfinite(number) for number in several.values())
    errors, returns = [0.75, 0.5, 1.0], [1.0, 1.0, 3.0]
    assert several["explained_variance"] == pytest.approx(1 - np.var(errors) / np.var(returns), rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("options", [{}, {"clip": 1.0}, {"scaling": "running"}])
def test_a_reward_that_is_not_finite_is_refused_and_named(bad, options):
    judged = replace(two_rollouts(), rewards_S=floats(1.0, bad))
    with pytest.raises(NonFiniteRewardError, match="1 of 2 rewards are NaN or infinite, in rollouts 1"):
        compute_advantages(judged, PLAIN, RewardConfig(**options), RunningMoments())


def test_a_cut_response_that_is_not_judged_is_refused_too_where_its_reward_is_not_finite():
    judged = replace(two_rollouts(), rewards_S=floats(1.0, math.nan))
    with pytest.raises(NonFiniteRewardError, match="rollouts 1"):
        compute_advantages(
            judged, PLAIN.model_copy(update={"bootstrap_truncated": True}), RewardConfig(), RunningMoments()
        )


def with_holes(seed: int) -> tuple[RolloutBatch, RolloutBatch]:
    """Makes rollouts with holes, whose numbers are NaN at them, and the same rollouts without the tokens of the holes.

    The value before each action is the same in both, and so is the value at the end.
    """
    rng = np.random.default_rng(seed)
    judged = random_rollouts(seed)
    masks = [rng.random(len(row)) < 0.6 for row in judged.log_probs]

    def holed(rows):
        return [np.where(mask, row, math.nan).astype(np.float32) for row, mask in zip(rows, masks, strict=True)]

    def packed(rows):
        return [row[mask] for row, mask in zip(rows, masks, strict=True)]

    token_rewards = [rng.normal(size=len(row)).astype(np.float32) for row in judged.log_probs]
    firsts = [length - 1 for length in judged.prompt_lengths]
    values = [
        np.concatenate([row[:first], row[first:-1][mask], row[-1:]])
        for row, mask, first in zip(judged.values, masks, firsts, strict=True)
    ]
    holes = replace(
        judged,
        masks=masks,
        log_probs=holed(judged.log_probs),
        ref_log_probs=holed(judged.ref_log_probs),
        token_rewards=token_rewards,
    )
    without = replace(
        judged,
        values=values,
        log_probs=packed(judged.log_probs),
        ref_log_probs=packed(judged.ref_log_probs),
        token_rewards=packed(token_rewards),
    )
    return holes, without


@pytest.mark.parametrize("options", [{}, {"bootstrap_truncated": True}, {"length_adaptive_alpha": 0.9}], ids=str)
def test_a_hole_is_no_step(options):
    holes, without = with_holes(5)
    algorithm = AlgorithmConfig(gamma=0.9, gae_lambda=0.8, kl_coefficient=0.3, **options)
    made = compute_advantages(holes, algorithm, RewardConfig(scaling="running"), EARLIER)
    expected = compute_advantages(without, algorithm, RewardConfig(scaling="running"), EARLIER)
    for name in ("advantages", "returns"):
        rows = getattr(made, name)
        assert [len(row) for row in rows] == [len(mask) for mask in holes.masks]
        assert all(not row[~mask].any() for row, mask in zip(rows, holes.masks, strict=True))
        assert_rows([row[mask] for row, mask in zip(rows, holes.masks, strict=True)], getattr(expected, name))
    assert made.metrics == pytest.approx(expected.metrics, rel=1e-5)


def test_options_that_are_not_given_leave_every_number_as_it_was():
    """A lambda of returns equal to the other one, and limits by their names, are what earlier versions did."""
    judged = random_rollouts(7)
    plain = AlgorithmConfig(gamma=0.9, gae_lambda=0.8)
    named = AlgorithmConfig(gamma=0.9, gae_lambda=0.8, critic_lambda=0.8, gae_step="token", baseline="critic")
    one, other = (compute_advantages(judged, each, RewardConfig(), EARLIER) for each in (plain, named))
    assert one.metrics == other.metrics
    for name in ("advantages", "returns"):
        for row, same in zip(getattr(one, name), getattr(other, name), strict=True):
            np.testing.assert_array_equal(row, same)


@pytest.mark.parametrize(
    ("options", "is_warmup", "critic_lambda"),
    [
        ({"critic_lambda": 0.3}, False, 0.3),
        ({"length_adaptive_alpha": 0.5}, False, 1.0),
        ({"length_adaptive_alpha": 0.5, "critic_lambda": 0.6}, False, 0.6),
        ({"value_warmup_lambda": 1.0}, True, 1.0),
        ({"value_warmup_lambda": 1.0}, False, 0.8),
        ({}, True, 0.8),
    ],
)
def test_returns_have_the_lambda_of_the_critic(options, is_warmup, critic_lambda):
    judged = random_rollouts(3)
    algorithm = AlgorithmConfig(gamma=0.9, gae_lambda=0.8, **options)
    made = compute_advantages(judged, algorithm, RewardConfig(), EARLIER, is_warmup=is_warmup)
    wanted = AlgorithmConfig(gamma=0.9, gae_lambda=critic_lambda)
    assert_rows(made.returns, slow_experience(judged, wanted, RewardConfig(), [3.0, -1.0, 0.5])[1])


def test_turns_are_actions_on_request_by_hand():
    batch = replace(two_rollouts(), masks=[np.array([True, True]), np.array([True])])
    algorithm = PLAIN.model_copy(update={"gae_step": "turn"})
    made = compute_advantages(batch, algorithm, RewardConfig(), RunningMoments())
    assert_rows(made.advantages, [[1.0 - 0.25] * 2, [1.0]])
    assert_rows(made.returns, [[1.0] * 2, [3.0]])


@pytest.mark.parametrize("kind", ["rloo", "grpo"])
def test_a_group_is_the_baseline_on_request_and_the_critics_returns_stay(kind):
    batch = replace(two_rollouts(), groups_S=np.array([4, 4]), truncated_S=np.array([False, False]))
    algorithm = PLAIN.model_copy(update={"baseline": kind})
    made = compute_advantages(batch, algorithm, RewardConfig(), RunningMoments())
    far = 2.0 if kind == "rloo" else 1 / math.sqrt(2)
    assert_rows(made.advantages, [[-far] * 2, [far]])
    assert_rows(made.returns, [[1.0, 1.0], [3.0]])
    with pytest.raises(ValueError, match="needs groups_S"):
        compute_advantages(two_rollouts(), algorithm, RewardConfig(), RunningMoments())


def test_values_are_measured_against_realised_returns_by_hand():
    metrics = compute_advantages(two_rollouts(), PLAIN, RewardConfig(), RunningMoments()).metrics
    # Values 0.25, 0.5 and 2 with returns 1, 1 and 3; actions 0 and 1 of two are in quarters 1 and 3, that of one in 1.
    assert metrics["value_calibration_error"] == pytest.approx((0.75 + 0.5 + 1.0) / 3)
    assert [metrics[f"value_predicted_{number}"] for number in (1, 2, 3)] == [0.25, 0.5, 2.0]
    assert [metrics[f"value_realised_{number}"] for number in (1, 2, 3)] == [1.0, 1.0, 3.0]
    assert metrics["value_error_1"] == pytest.approx(math.sqrt((0.75**2 + 1.0) / 2))
    assert metrics["value_error_3"] == pytest.approx(0.5)
    assert (metrics["advantage_1"], metrics["advantage_3"]) == pytest.approx(((0.75 + 1.0) / 2, 0.5))
    assert not {"value_error_2", "advantage_4", "value_predicted_4"} & metrics.keys()


PROMPTS_OF_ROLLOUTS = [7, 7, 7, 2, 2, 9, 4, 4, 4, 7]  # one prompt appears twice


@pytest.mark.parametrize("minibatches", [1, 2, 3, 4])
def test_minibatches_hold_every_rollout_once_and_a_prompts_rollouts_together(minibatches):
    batches = minibatch_rows(PROMPTS_OF_ROLLOUTS, minibatches, [0, 1])
    assert len(batches) == minibatches
    assert sorted(row for batch in batches for row in batch) == list(range(len(PROMPTS_OF_ROLLOUTS)))
    of_batches = [{PROMPTS_OF_ROLLOUTS[row] for row in batch} for batch in batches]
    assert sum(len(prompts) for prompts in of_batches) == len(set(PROMPTS_OF_ROLLOUTS))
    assert max(len(prompts) for prompts in of_batches) - min(len(prompts) for prompts in of_batches) <= 1


def test_rewards_that_are_not_used_scale_nothing():
    bootstrapped = PLAIN.model_copy(update={"bootstrap_truncated": True})
    for unused in (3.0, 1e6):
        judged = replace(two_rollouts(), rewards_S=floats(1.0, unused))
        made = compute_advantages(judged, bootstrapped, RewardConfig(scaling="running"), EARLIER)
        assert made.moments == EARLIER.updated(torch.tensor([1.0]))


def test_no_minibatch_is_empty_where_there_are_fewer_prompts():
    batches = minibatch_rows([3, 3, 5], 8, [0])
    assert sorted(map(sorted, batches)) == [[0, 1], [2]]


def test_minibatches_come_from_the_seed_alone():
    prompts = list(range(40))
    assert minibatch_rows(prompts, 4, [1, 2, 3]) == minibatch_rows(prompts, 4, [1, 2, 3])
    assert minibatch_rows(prompts, 4, [1, 2, 3]) != minibatch_rows(prompts, 4, [1, 2, 4])


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
@pytest.mark.parametrize(
    ("field", "who"),
    [
        ("values", "a value of the critic"),
        ("log_probs", "a log-probability of the policy"),
        ("ref_log_probs", "a log-probability of the reference policy"),
    ],
)
def test_numbers_of_models_that_are_not_finite_end_the_run_with_advice(field, who, bad):
    judged = two_rollouts()
    numbers = [row.copy() for row in getattr(judged, field)]
    numbers[1][0] = bad
    with pytest.raises(DivergedError, match=rf"{who} is NaN or infinite in 1 of 2 rollouts.*learning-rate"):
        compute_advantages(replace(judged, **{field: numbers}), PLAIN, RewardConfig(), RunningMoments())
