"""A lease finds exactly the tokens whose slots hold their prefix, and no slot has two tokens at once."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_critic.batching import prefix_cache
from rlhf_critic.batching.prefix_cache import PrefixCache
from rlhf_critic.batching.prefix_tree import PrefixTree

SEQUENCES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=5)
PASSES = st.lists(st.tuples(SEQUENCES, st.booleans(), st.booleans()), min_size=1, max_size=14)


class Written:
    """Reference: the prefix that each slot holds, and whether it has a value, as a store would hold them."""

    def __init__(self):
        self.prefix = {}
        self.has_value = {}

    def check(self, lease, sequences, with_values):
        for ids, slots in zip(sequences, lease.slots_S, strict=True):
            assert len(slots) < len(ids)
            for position, slot in enumerate(slots.tolist()):
                assert self.prefix[slot] == tuple(ids[: position + 1])
                assert self.has_value[slot] or not with_values

    def write(self, tree, sequences, slots, with_values):
        """Writes as the forward pass does: the first computed tokens, in the order of the tree."""
        prefixes = [
            tuple(sequences[sequence][: int(tree.position_ids_T[token]) + 1])
            for run in tree.computed_runs.tolist()
            for sequence in [int(tree.run_sequences_R[run])]
            for token in range(int(tree.run_starts_R[run]), int(tree.run_ends_R[run]))
        ]
        for slot, prefix in zip(slots.tolist(), prefixes, strict=False):
            self.prefix[slot], self.has_value[slot] = prefix, with_values


def nodes_of(cache):
    nodes, waiting = [], [cache._root]
    while waiting:
        node = waiting.pop()
        nodes += [node] if node.parent else []
        waiting += node.children.values()
    return nodes


def check_books(cache, slots):
    """Every slot is free or has one token; children are used before their parents are evicted; no lease is left."""
    nodes = nodes_of(cache)
    used = [slot for node in nodes for slot in node.slots_N.tolist()]
    free = [*range(cache._unused, slots), *(slot for freed in cache._freed for slot in freed.tolist())]
    assert sorted(used + free) == list(range(slots))
    assert cache.cached_tokens == len(used)
    order = {node: index for index, node in enumerate(cache._order)}
    assert set(order) == set(nodes)
    for node in nodes:
        assert len(node.ids_N) == len(node.slots_N) > 0
        assert node.leases == 0
        assert all(order[child] < order[node] for child in node.children.values())
        assert all(int(child.ids_N[0]) == first for first, child in node.children.items())


@pytest.mark.parametrize("used_from", [prefix_cache.USED_FROM, 0.5])
def test_streams_of_passes_find_what_was_written(monkeypatch, used_from):
    """With 0.5, many prefixes that the cache has are computed again, some beside sequences that use them."""
    monkeypatch.setattr(prefix_cache, "USED_FROM", used_from)

    @settings(max_examples=60, deadline=None)
    @given(PASSES, st.integers(1, 40))
    def stream(passes, slots):
        cache, written = PrefixCache(slots), Written()
        found = 0
        for sequences, with_values, fails in passes:
            known = cache.known_lengths(sequences, with_values)
            try:
                with cache.lease(sequences, with_values) as lease:
                    assert [len(one) for one in lease.slots_S] == known
                    written.check(lease, sequences, with_values)
                    tree = PrefixTree.build(sequences, known)
                    reserved = lease.reserve(tree.computed_tokens)
                    held = {slot for one in lease.slots_S for slot in one.tolist()}
                    assert held.isdisjoint(reserved.tolist())
                    assert len(reserved) == min(tree.computed_tokens, slots - len(held) - leased_beyond(cache, held))
                    written.write(tree, sequences, reserved, with_values)
                    if fails:
                        raise MemoryError
                    lease.keep(tree)
            except MemoryError:
                pass
            found += sum(known)
            check_books(cache, slots)
        assert cache.hit_tokens == found

    stream()


def leased_beyond(cache, held):
    """Returns the number of slots of leased nodes that no sequence of the lease uses."""
    leased = {slot for node in nodes_of(cache) if node.leases for slot in node.slots_N.tolist()}
    return len(leased - held)


def compute(cache, sequences, with_values=False):
    with cache.lease(sequences, with_values) as lease:
        tree = PrefixTree.build(sequences, [len(slots) for slots in lease.slots_S])
        lease.reserve(tree.computed_tokens)
        lease.keep(tree)
    return tree.computed_tokens


def test_what_was_used_longest_ago_is_evicted_from_the_end_of_its_path():
    cache = PrefixCache(10)
    compute(cache, [[1, 2, 3, 4]])
    compute(cache, [[5, 6, 7]])
    assert cache.known_lengths([[1, 2, 3, 4, 0], [5, 6, 7, 0]], False) == [4, 3]
    compute(cache, [[5, 6, 7, 8]])
    compute(cache, [[9, 9, 9, 9]])
    assert cache.known_lengths([[1, 2, 3, 4, 0], [5, 6, 7, 8, 0], [9, 9, 9, 9, 0]], False) == [2, 4, 4]
    assert cache.evicted_tokens == 2


def test_an_entry_in_use_is_not_evicted():
    cache = PrefixCache(4)
    compute(cache, [[1, 2, 3, 4]])
    with cache.lease([[1, 2, 3, 4, 5]], False) as lease:
        assert len(lease.reserve(3)) == 0
        with cache.lease([[7, 8]], False) as other:
            assert len(other.reserve(2)) == 0
        assert cache.known_lengths([[1, 2, 3, 4, 5]], False) == [4]
    assert compute(cache, [[7, 8]]) == 2
    assert cache.known_lengths([[1, 2, 3, 4, 5], [7, 8, 9]], False) == [2, 2]


def test_values_are_found_only_where_they_were_computed():
    cache = PrefixCache(100)
    compute(cache, [[1, 2, 3, 4]])
    longer = [[1, 2, 3, 4, 5, 6]]
    assert cache.known_lengths(longer, False) == [4]
    assert cache.known_lengths(longer, True) == [0]
    assert compute(cache, longer, with_values=True) == 6
    assert cache.known_lengths(longer, True) == [5]
    assert cache.cached_tokens == 6


def test_a_prefix_that_is_a_small_part_of_its_sequence_is_computed_again():
    """All sequences begin with BOS. Attention to it in a call of its own costs more than to compute it."""
    cache = PrefixCache(1000)
    assert compute(cache, [[1, *range(10, 110)]]) == 101
    assert compute(cache, [[1, *range(200, 300)]]) == 101
    assert compute(cache, [[1, *range(10, 13), *range(300, 396)]]) == 96
    assert cache.cached_tokens == 1 + 100 + 100 + 96
    assert cache.hit_tokens == 4
    check_books(cache, 1000)


def test_a_long_path_of_many_turns_costs_its_length():
    """Each of 200 turns computes its own tokens and adds one node."""
    cache = PrefixCache(5000)
    turns = [index % 7 for index in range(2000)]
    for end in range(10, 2001, 10):
        assert compute(cache, [turns[:end]]) == 10
    assert len(nodes_of(cache)) == 200


@pytest.mark.parametrize("cached", [[3], [4]])
def test_the_last_token_must_be_computed(cached):
    with pytest.raises(ValueError, match="last token"):
        PrefixTree.build([[1, 2, 3]], cached)
