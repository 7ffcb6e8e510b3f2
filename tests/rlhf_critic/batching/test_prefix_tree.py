"""The tree contains every distinct prefix once, and every sequence is a path through it."""

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from rlhf_critic.batching.prefix_tree import PrefixTree
from rlhf_critic.batching.prefix_tree_batch import PrefixTreeBatch

# Few distinct ids, so that sequences often share, contain and repeat prefixes.
SEQUENCES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), min_size=1, max_size=12)
UNRELATED, CONTAINED, TWICE, ONE_TOKEN = [[1, 2], [2, 1]], [[1, 2, 3], [1, 2], [1]], [[5, 6]] * 3, [[70000]]


def distinct_prefixes(sequences: list[list[int]]) -> set[tuple[int, ...]]:
    return {tuple(sequence[: end + 1]) for sequence in sequences for end in range(len(sequence))}


@given(SEQUENCES)
@example(UNRELATED)
@example(CONTAINED)
@example(TWICE)
@example(ONE_TOKEN)
def test_every_distinct_prefix_is_one_token_and_every_sequence_a_path(sequences):
    tree = PrefixTree.build(sequences)
    assert len(tree) == len(distinct_prefixes(sequences))
    for sequence, leaf in zip(sequences, tree.leaves_S, strict=True):
        path = tree.path_tokens(int(leaf))
        assert tree.input_ids_T[path].tolist() == sequence
        assert tree.position_ids_T[path].tolist() == list(range(len(sequence)))
    assert set(tree.leaves_S) == set(tree.run_ends_R - 1)


@given(SEQUENCES)
@example(UNRELATED)
@example(CONTAINED)
@example(TWICE)
def test_subtrees_are_contiguous(sequences):
    """Block masks rest on this comparison: t is below u if u <= t < subtree_ends[u]."""
    tree = PrefixTree.build(sequences)
    for token in range(len(tree)):
        ancestors = set(tree.path_tokens(token).tolist())
        below = {other for other in range(token + 1) if token < tree.subtree_ends_T[other]}
        assert below == ancestors
    np.testing.assert_array_equal(tree.subtree_ends_R, tree.subtree_ends_T[tree.run_starts_R])


@given(SEQUENCES, st.randoms(use_true_random=False))
def test_the_order_of_sequences_only_orders_the_answers(sequences, random):
    shuffled = random.sample(range(len(sequences)), len(sequences))
    tree, other = PrefixTree.build(sequences), PrefixTree.build([sequences[index] for index in shuffled])
    np.testing.assert_array_equal(tree.input_ids_T, other.input_ids_T)
    np.testing.assert_array_equal(tree.leaves_S[shuffled], other.leaves_S)


def test_a_batch_gathers_values_back_to_sequences():
    sequences = [[7, 8, 9], [7, 8], [7, 8, 5, 4]]
    batch = PrefixTreeBatch.from_sequences([np.array(sequence, dtype=np.int32) for sequence in sequences])
    assert batch.computed_tokens == 5
    gathered = batch.input_ids_1T[0][batch.tokens_SL]
    for row, sequence in enumerate(sequences):
        assert gathered[row, : len(sequence)].tolist() == sequence
    assert batch.input_ids_1T[0][batch.leaves_S].tolist() == [9, 8, 4]
    assert batch.input_ids_1T.dtype == batch.position_ids_1T.dtype == torch.int64


@pytest.mark.parametrize("sequences", [[], [[1], []]])
def test_nothing_to_pack_is_refused(sequences):
    with pytest.raises(ValueError, match="at least one token"):
        PrefixTree.build(sequences)
