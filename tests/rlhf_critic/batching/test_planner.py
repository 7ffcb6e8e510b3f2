"""Plans cover every unit exactly once, fit the budget, and keep units with a shared prompt together."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rlhf_critic.batching.planner import MicroBatch, plan_micro_batches, plan_sequences
from rlhf_critic.batching.prefix_tree import PrefixTree

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


def test_nothing_to_plan_and_empty_sequences_are_refused():
    with pytest.raises(ValueError, match="nothing to plan"):
        plan_sequences([], 1, 10, prefix_tree=True)
    with pytest.raises(ValueError, match="sequence 1 is empty"):
        plan_sequences([[1], [], [2]], 1, 10, prefix_tree=True)
