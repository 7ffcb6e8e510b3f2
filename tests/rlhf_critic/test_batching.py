"""Plans cover everything exactly once, fit the budget, and are the same wherever they are made."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_critic.batching import global_batch, plan_micro_batches, plan_sequences, steps_in

LENGTHS = st.lists(st.tuples(st.integers(1, 300), st.integers(1, 300)), min_size=1, max_size=80)


@given(lengths=LENGTHS, world_size=st.integers(1, 5), token_budget=st.integers(1, 2000))
def test_every_unit_runs_once_and_ranks_run_equally_often(lengths, world_size, token_budget):
    lengths_U2 = np.array(lengths)
    plan = plan_micro_batches(lengths_U2, world_size, token_budget)
    assert len(plan) == world_size
    assert len({len(micro_batches) for micro_batches in plan}) == 1
    real = [unit for micro_batches in plan for mb in micro_batches if mb.weight for unit in mb.units]
    assert sorted(real) == list(range(len(lengths)))
    for micro_batches in plan:
        for micro_batch in micro_batches:
            padded = 2 * len(micro_batch.units) * lengths_U2[list(micro_batch.units)].max()
            assert padded <= token_budget or len(micro_batch.units) == 1
    assert plan == plan_micro_batches(lengths_U2, world_size, token_budget)


@given(lengths=LENGTHS, world_size=st.integers(1, 5))
def test_ranks_get_about_the_same_number_of_tokens(lengths, world_size):
    lengths_U2 = np.array(lengths)
    plan = plan_micro_batches(lengths_U2, world_size, 600)
    tokens = [
        sum(int(lengths_U2[unit].sum()) for mb in micro_batches if mb.weight for unit in mb.units)
        for micro_batches in plan
    ]
    # Greedy placement never leaves two ranks further apart than one unit.
    assert max(tokens) - min(tokens) <= lengths_U2.sum(axis=1).max()


@given(
    count=st.integers(1, 60),
    batch=st.integers(1, 70),
    epochs=st.sampled_from([0.5, 1.0, 1.7, 3.0]),
    seed=st.integers(0, 3),
)
def test_an_epoch_shows_every_preference_once_and_nothing_is_left_out(count, batch, epochs, seed):
    steps = steps_in(count, batch, epochs)
    batches = [global_batch(count, batch, epochs, seed, step) for step in range(steps)]
    shown = np.concatenate(batches) if batches else np.array([], dtype=int)
    assert len(shown) == round(count * epochs)
    assert all(len(rows) == batch for rows in batches[:-1])
    for epoch in range(int(epochs)):
        assert sorted(shown[epoch * count : (epoch + 1) * count]) == list(range(count))
    with pytest.raises(ValueError, match="past the end"):
        global_batch(count, batch, epochs, seed, steps)


def test_epochs_and_seeds_differ_in_order():
    first, second, other = (global_batch(50, 50, 2, seed, step) for seed, step in ((0, 0), (0, 1), (1, 0)))
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, other)


def test_nothing_to_plan_and_empty_sequences_are_refused():
    with pytest.raises(ValueError, match="nothing to plan"):
        plan_sequences([], 1, 10)
    with pytest.raises(ValueError, match="sequence 1 is empty"):
        plan_sequences([[1], [], [2]], 1, 10)
