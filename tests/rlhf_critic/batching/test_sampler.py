"""Every epoch shows each row once, in an order that depends on the seed and the epoch alone."""

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_critic.batching.sampler import DataOrder, steps_in


@given(
    prompts=st.lists(st.integers(0, 20), min_size=1, max_size=60),
    batch=st.integers(1, 70),
    epochs=st.sampled_from([0.5, 1.0, 1.7, 3.0]),
    seed=st.integers(0, 3),
)
def test_an_epoch_shows_every_preference_once_and_prompts_stay_together(prompts, batch, epochs, seed):
    prompts_N = np.array(prompts)
    count = len(prompts)
    steps = steps_in(count, batch, epochs)
    batches = [DataOrder(prompts_N, seed).rows_of_step(batch, step, epochs) for step in range(steps)]
    shown = np.concatenate(batches) if batches else np.array([], dtype=int)
    assert len(shown) == round(count * epochs)
    assert all(len(rows) == batch for rows in batches[:-1])
    for epoch in range(int(epochs)):
        of_epoch = shown[epoch * count : (epoch + 1) * count]
        assert sorted(of_epoch) == list(range(count))
        changes = np.count_nonzero(np.diff(prompts_N[of_epoch]))
        assert changes == len(set(prompts)) - 1
    with pytest.raises(ValueError, match="past the end"):
        DataOrder(prompts_N, seed).rows_of_step(batch, steps, epochs)


def test_epochs_and_seeds_differ_in_order():
    prompts_N = np.arange(50)
    first, second, other = (
        DataOrder(prompts_N, seed).rows_of_step(50, step, 2) for seed, step in ((0, 0), (0, 1), (1, 0))
    )
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, other)
    assert not np.array_equal(first, np.sort(first))
    of_one_prompt = [DataOrder(np.zeros(50, dtype=int), 0).rows_of_step(50, step, 2) for step in (0, 1)]
    assert not np.array_equal(*of_one_prompt)
    assert not np.array_equal(of_one_prompt[0], np.sort(of_one_prompt[0]))


@given(rows=st.integers(1, 30), size=st.integers(1, 40), seed=st.integers(0, 3), step=st.integers(0, 9))
def test_without_epochs_steps_are_full_and_never_end(rows, size, seed, step):
    ids = np.arange(rows)
    found = DataOrder(ids, seed).rows_of_step(size, step)
    assert len(found) == size
    assert np.array_equal(found, DataOrder(ids, seed).rows_of_step(size, step, epochs=(step + 1) * size / rows + 1))


@settings(deadline=None)
@given(
    prompts=st.lists(st.integers(0, 30), min_size=1, max_size=60),
    size=st.integers(1, 70),
    seed=st.integers(0, 3),
    steps=st.lists(st.integers(0, 4), min_size=1, max_size=6),
)
def test_the_order_is_that_of_sorting_rows_by_two_keys_whatever_was_asked_before(prompts, size, seed, steps):
    """Runs of earlier versions sorted all rows in each step. They resume with the same rows to the digit."""
    prompts_N = np.unique(prompts, return_inverse=True)[1]

    @functools.cache
    def epoch_of_earlier_versions(epoch: int) -> np.ndarray:
        rng = np.random.default_rng([seed, epoch])
        rank_of_prompt = rng.permutation(int(prompts_N.max()) + 1)
        return np.lexsort((rng.permutation(len(prompts_N)), rank_of_prompt[prompts_N]))

    order = DataOrder(prompts_N, seed)
    for step in steps:
        places = range(step * size, (step + 1) * size)
        expected = [epoch_of_earlier_versions(place // len(prompts))[place % len(prompts)] for place in places]
        assert order.rows_of_step(size, step).tolist() == expected


def test_an_epoch_is_sorted_once(monkeypatch):
    sorted_epochs: list[int] = []
    sort = DataOrder._sorted_rows

    def count(order: DataOrder, epoch: int) -> np.ndarray:
        sorted_epochs.append(epoch)
        return sort(order, epoch)

    monkeypatch.setattr(DataOrder, "_sorted_rows", count)
    order = DataOrder(np.arange(1000), 0)
    for step in range(300):  # 2.1 epochs, in steps that do not divide an epoch
        order.rows_of_step(7, step)
    assert sorted_epochs == [0, 1, 2]
