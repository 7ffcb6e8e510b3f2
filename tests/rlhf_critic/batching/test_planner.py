"""Plans cover every unit exactly once, fit the budget, and keep units with a shared prompt together."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rlhf_critic.batching.planner import MicroBatch, plan_micro_batches, plan_sequences
from rlhf_critic.batching.prefix_tree import PrefixTree
from rlhf_critic.batching.sampler import rows_of_step, steps_in

Unit = tuple[list[int], ...]
# Few ids and a few common prefixes, so that units share prefixes of all lengths.
BEGINNINGS = st.sampled_from([[], [1, 2, 1, 2, 1, 2], [1, 2, 1, 1, 1, 1, 2, 2, 2, 2], [2] * 30])
TEXTS = st.builds(
    lambda beginning, rest: beginning + rest, BEGINNINGS, st.lists(st.integers(1, 2), min_size=1, max_size=25)
)
UNITS = st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=30)


def tokens_of(units: list[Unit], micro_batch: MicroBatch, prefix_tree: bool) -> int:
    sequences = [sequence for unit in micro_batch.units for sequence in units[unit]]
    return len(PrefixTree.build(sequences)) if prefix_tree else len(sequences) * max(map(len, sequences))


@given(
    units=UNITS,
    world_size=st.integers(1, 5),
    token_budget=st.integers(1, 400),
    prefix_tree=st.sampled_from([True, False]),
)
# Neighbours of neighbours share less than neighbours: the second and the fourth share only one token.
@example(
    units=[([1, 1, 1, 2],), ([1, 1, 1, 1, 1],), ([1, 2, 2],), ([1, 2, 2, 2, 2],)],
    world_size=2,
    token_budget=6,
    prefix_tree=True,
)
def test_every_unit_runs_once_within_the_budget_and_ranks_run_equally_often(
    units, world_size, token_budget, prefix_tree
):
    plan = plan_micro_batches(units, world_size, token_budget, prefix_tree)
    assert len(plan) == world_size
    assert len({len(micro_batches) for micro_batches in plan}) == 1
    real = [unit for micro_batches in plan for mb in micro_batches if mb.weight for unit in mb.units]
    assert sorted(real) == list(range(len(units)))
    for micro_batches in plan:
        assert [mb.weight for mb in micro_batches] == sorted(mb.weight for mb in micro_batches)
        for micro_batch in micro_batches:
            within = tokens_of(units, micro_batch, prefix_tree) <= token_budget
            assert within or len(micro_batch.units) == 1
    assert plan == plan_micro_batches(units, world_size, token_budget, prefix_tree)


@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=80), world_size=st.integers(1, 5))
@pytest.mark.parametrize("prefix_tree", [True, False], ids=["prefix tree", "padded"])
def test_ranks_get_about_the_same_number_of_tokens(prefix_tree, lengths, world_size):
    units = [[[1000 * number + token for token in range(length)]] for number, length in enumerate(lengths)]
    plan = plan_micro_batches(units, world_size, 600, prefix_tree)
    tokens = [sum(lengths[unit] for mb in micro_batches if mb.weight for unit in mb.units) for micro_batches in plan]
    # With greedy placement two ranks differ by at most one unit.
    assert max(tokens) - min(tokens) <= max(lengths)


def rollouts(prompts: int, each: int, prompt: int = 40, response: int = 10) -> list[list[int]]:
    """Makes unrelated prompts with different responses, in scattered order."""
    rng = np.random.default_rng(0)
    beginnings = [rng.integers(0, 10_000, prompt).tolist() for _ in range(prompts)]
    return [beginning + rng.integers(0, 10_000, response).tolist() for _ in range(each) for beginning in beginnings]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_rollouts_of_a_prompt_compute_it_once(world_size):
    sequences = rollouts(prompts=12, each=4)
    plan = plan_sequences(sequences, world_size, 250, prefix_tree=True)
    units = [[sequence] for sequence in sequences]
    computed = sum(tokens_of(units, mb, True) for micro_batches in plan for mb in micro_batches if mb.weight)
    assert computed == 12 * (40 + 4 * 10)
    padded = plan_sequences(sequences, world_size, 250, prefix_tree=False)
    assert sum(tokens_of(units, mb, False) for mbs in padded for mb in mbs if mb.weight) == 48 * 50


def test_one_prompt_is_shared_out_when_other_ranks_would_have_nothing_to_do():
    sequences = rollouts(prompts=1, each=40)
    plan = plan_sequences(sequences, 2, 10_000, prefix_tree=True)
    assert [len(micro_batches) for micro_batches in plan] == [1, 1]
    assert all(micro_batches[0].weight for micro_batches in plan)
    assert min(len(micro_batches[0].units) for micro_batches in plan) >= 15


def test_comparisons_of_the_same_answers_cost_each_answer_once():
    """Plans a ranking of four answers as six pairs: the prompt and every answer are computed once."""
    answers = rollouts(prompts=1, each=4)
    pairs = [(answers[better], answers[worse]) for better in range(4) for worse in range(better + 1, 4)]
    ((micro_batch,),) = plan_micro_batches(pairs, 1, 10_000, prefix_tree=True)
    assert tokens_of(pairs, micro_batch, True) == 40 + 4 * 10


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
    batches = [rows_of_step(prompts_N, batch, seed, step, epochs) for step in range(steps)]
    shown = np.concatenate(batches) if batches else np.array([], dtype=int)
    assert len(shown) == round(count * epochs)
    assert all(len(rows) == batch for rows in batches[:-1])
    for epoch in range(int(epochs)):
        of_epoch = shown[epoch * count : (epoch + 1) * count]
        assert sorted(of_epoch) == list(range(count))
        changes = np.count_nonzero(np.diff(prompts_N[of_epoch]))
        assert changes == len(set(prompts)) - 1
    with pytest.raises(ValueError, match="past the end"):
        rows_of_step(prompts_N, batch, seed, steps, epochs)


def test_epochs_and_seeds_differ_in_order():
    prompts_N = np.arange(50)
    first, second, other = (rows_of_step(prompts_N, 50, seed, step, 2) for seed, step in ((0, 0), (0, 1), (1, 0)))
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, other)
    assert not np.array_equal(first, np.sort(first))
    of_one_prompt = [rows_of_step(np.zeros(50, dtype=int), 50, 0, step, 2) for step in (0, 1)]
    assert not np.array_equal(*of_one_prompt)
    assert not np.array_equal(of_one_prompt[0], np.sort(of_one_prompt[0]))


@given(rows=st.integers(1, 30), size=st.integers(1, 40), seed=st.integers(0, 3), step=st.integers(0, 9))
def test_without_epochs_steps_are_full_and_never_end(rows, size, seed, step):
    ids = np.arange(rows)
    found = rows_of_step(ids, size, seed, step)
    assert len(found) == size
    assert np.array_equal(found, rows_of_step(ids, size, seed, step, epochs=(step + 1) * size / rows + 1))


def test_nothing_to_plan_and_empty_sequences_are_refused():
    with pytest.raises(ValueError, match="nothing to plan"):
        plan_sequences([], 1, 10, prefix_tree=True)
    with pytest.raises(ValueError, match="sequence 1 is empty"):
        plan_sequences([[1], [], [2]], 1, 10, prefix_tree=True)
