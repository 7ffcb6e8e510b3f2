"""Rollouts become columns of an update, and minibatches of an iteration are those of earlier versions."""

import numpy as np
import pytest

from actors.ppo.experience import MINIBATCHES, batch_of, means, minibatches_of
from actors.ppo.rollout_workers import Rollout
from rlhf_critic.algorithms.advantages import minibatch_rows
from rlhf_critic.config.ppo import AlgorithmConfig

ROWS = [5, 5, 2, 2, 9, 9]


def rollout(row: int, tokens: int, **of_tokens: object) -> Rollout:
    log_probs = np.full(tokens, -1.0, dtype=np.float32)
    ids = np.arange(tokens) + 10
    return Rollout(row, "p", (1, 2), "r", ids, log_probs, row == 9, False, float(row), {}, "m@1", 0, **of_tokens)


def test_rollouts_of_one_turn_have_no_masks():
    batch = batch_of([rollout(5, 3), rollout(9, 2)], [np.zeros(5), np.zeros(4)], [np.zeros(3), np.zeros(2)])
    assert (batch.masks, batch.token_rewards) == (None, None)
    assert batch.prompt_lengths == [2, 2]
    assert batch.rewards_S.tolist() == [5.0, 9.0]
    assert batch.truncated_S.tolist() == [False, True]
    assert batch.groups_S.tolist() == [5, 9]


def test_masks_and_rewards_of_some_rollouts_are_filled_up_for_the_others():
    mask, rewards = np.array([True, False, True]), np.array([0.5, 0.0, 1.0], dtype=np.float32)
    batch = batch_of([rollout(5, 3, mask=mask, token_rewards=rewards), rollout(9, 2)], [], [])
    assert [one.tolist() for one in batch.masks] == [[True, False, True], [True, True]]
    assert [one.tolist() for one in batch.token_rewards] == [[0.5, 0.0, 1.0], [0.0, 0.0]]


@pytest.mark.parametrize("critic_epochs", [1, 3])
def test_the_critic_makes_its_passes_after_those_it_shares_with_the_policy(critic_epochs):
    ppo = AlgorithmConfig(epochs=2, minibatches=2, seed=7, critic_epochs=critic_epochs)
    of_critic, of_policy = minibatches_of(ROWS, ppo, iteration=4)
    passes = [minibatch_rows(ROWS, 2, [7, MINIBATCHES, 4, epoch]) for epoch in range(2 * critic_epochs)]
    assert of_critic == [part for one in passes for part in one]
    assert of_policy == [part for one in passes[:2] for part in one]


def test_the_policy_has_no_minibatches_while_values_warm_up():
    ppo = AlgorithmConfig(value_warmup_iterations=2)
    assert [bool(minibatches_of(ROWS, ppo, iteration)[1]) for iteration in range(4)] == [False, False, True, True]
    assert all(minibatches_of(ROWS, ppo, iteration)[0] for iteration in range(4))
    assert means("policy", [], ["loss"]) == {}
