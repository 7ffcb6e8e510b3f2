"""Both plans show every token each of its ancestors and itself, once, and nothing else."""

from collections import defaultdict

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from rlhf_critic.batching.device_copy import pack, unpack
from rlhf_critic.batching.prefix_tree import PrefixTree
from rlhf_critic.batching.varlen_plan import VarlenCall, level_calls, path_calls, run_depths

SEQUENCES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), min_size=1, max_size=12)
UNRELATED, CONTAINED, TWICE, ONE_TOKEN = [[1, 2], [2, 1]], [[1, 2, 3], [1, 2], [1]], [[5, 6]] * 3, [[70000]]


def seen(tree: PrefixTree, calls: tuple[VarlenCall, ...], queries: int) -> dict[int, list[int]]:
    """The keys of each query over all calls."""
    keys_of = defaultdict(list)
    for call in calls:
        query_ids = list(range(queries)) if call.queries_Q is None else call.queries_Q.tolist()
        key_ids = list(range(len(tree))) if call.keys_N is None else call.keys_N.tolist()
        query_starts, key_starts = call.query_starts_B.tolist(), call.key_starts_B.tolist()
        assert (query_starts[-1], key_starts[-1]) == (len(query_ids), len(key_ids))
        edges = zip(query_starts, query_starts[1:], key_starts, key_starts[1:], strict=False)
        longest = [0, 0]
        for query_start, query_end, key_start, key_end in edges:
            q, n = query_end - query_start, key_end - key_start
            longest = [max(longest[0], q), max(longest[1], n)]
            for place in range(q):
                last = key_start + n - q + place + 1 if call.causal else key_end
                keys_of[query_ids[query_start + place]] += key_ids[key_start:last]
        assert longest == [call.max_queries, call.max_keys]
    return keys_of


@pytest.mark.parametrize("plan", [path_calls, level_calls])
@given(sequences=SEQUENCES)
@example(sequences=UNRELATED)
@example(sequences=CONTAINED)
@example(sequences=TWICE)
@example(sequences=ONE_TOKEN)
def test_every_query_sees_its_path_once(plan, sequences):
    tree = PrefixTree.build(sequences)
    calls = plan(tree)
    every, leaves = seen(tree, calls.every, len(tree)), seen(tree, calls.leaves, len(tree.run_starts_R))
    for token in range(len(tree)):
        assert sorted(every[token]) == tree.path_tokens(token).tolist()
    for run, end in enumerate(tree.run_ends_R.tolist()):
        assert sorted(leaves[run]) == tree.path_tokens(end - 1).tolist()


@given(SEQUENCES)
def test_depths_count_the_runs_above(sequences):
    tree = PrefixTree.build(sequences)
    for run, depth in enumerate(run_depths(tree).tolist()):
        path = tree.path_tokens(int(tree.run_starts_R[run]))
        assert depth == len(set(tree.run_of_T[path].tolist())) - 1


def test_calls_keep_their_order_when_their_arrays_move():
    calls = level_calls(PrefixTree.build([[1, 2, 3, 4], [1, 2, 5], [1, 2, 5, 6], [1, 7]]))
    moved = calls.with_tensors([tensor.clone() for tensor in calls.tensors()])
    assert len(calls.every) > 2
    for one, other in zip((*calls.every, *calls.leaves), (*moved.every, *moved.leaves), strict=True):
        assert vars(one).keys() == vars(other).keys()
        for name, value in vars(one).items():
            same = torch.equal(value, getattr(other, name)) if isinstance(value, torch.Tensor) else None
            assert same if same is not None else value == getattr(other, name)


def test_packed_tensors_come_out_as_they_went_in():
    tensors = [
        torch.arange(5, dtype=torch.int32),
        torch.arange(6).view(2, 3),
        torch.empty(0, dtype=torch.int64),
        torch.tensor(2.5, dtype=torch.float64),
        torch.rand(3, 2).T,
    ]
    buffer, offsets = pack(tensors, pin_memory=False)
    for tensor, offset in zip(tensors, offsets, strict=True):
        found = unpack(buffer, offset, tensor)
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor)
