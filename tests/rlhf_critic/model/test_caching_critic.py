"""A critic with a prefix cache gives the rewards and values of one without, in every family and kernel."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_critic.model.caching_critic import CachingCritic
from rlhf_critic.model.critic import Critic
from tests.rlhf_critic.families import VOCABULARY, family_configs, kernels_of, random_model

CPU = torch.device("cpu")
TOLERANCE = {"rtol": 0.0, "atol": 1e-5}
CASES = [
    (name, kernel) for name, config in family_configs().items() if name != "bloom" for kernel in kernels_of(config)
]
SLOTS = 60  # few, so that streams evict
SEQUENCES = st.lists(st.lists(st.integers(3, 5), min_size=1, max_size=12), min_size=1, max_size=3)
PASSES = st.lists(st.tuples(SEQUENCES, st.booleans()), min_size=2, max_size=6)


def critics_of(name: str, kernel: str) -> tuple[Critic, Critic]:
    """Returns a critic with a store, and the same critic without."""
    cached, cold = (Critic(random_model(family_configs()[name], kernel)).eval() for _ in range(2))
    assert cached.create_store(10**6, CPU)  # tells the bytes of a slot
    assert cached.create_store(SLOTS * cached.store.bytes_per_slot, CPU)
    return cached, cold


@pytest.fixture(scope="module")
def critics() -> tuple[Critic, Critic]:
    return critics_of("llama", "sdpa")


@torch.no_grad()
def check(caching, cold, sequences, rewards_only):
    output, _, computed = caching.forward(sequences, rewards_only)
    expected = cold(cold.batch_of(sequences), rewards_only=rewards_only)
    for found, wanted, ids in zip(output, expected, sequences, strict=True):
        length = None if rewards_only else len(ids)
        torch.testing.assert_close(*(torch.atleast_1d(row)[:length] for row in (found, wanted)), **TOLERANCE)
    return computed


def draw(length, seed):
    return np.random.default_rng(seed).integers(3, VOCABULARY, length).tolist()


@pytest.mark.parametrize(("name", "kernel"), CASES, ids=["-".join(case) for case in CASES])
def test_every_family_gives_what_it_gives_without_a_cache(name, kernel):
    """Runs that a batch shares, below prefixes that the cache has, and prefixes that others of the batch lack."""
    cached, cold = critics_of(name, kernel)
    caching = CachingCritic(cached, CPU)
    first, second = draw(8, 0), draw(6, 1)
    assert check(caching, cold, [first, second], rewards_only=True) == 14
    middle = first[:5] + draw(4, 2)
    sequences = [first + draw(2, 3), first[:3], middle, middle + draw(3, 4), middle + draw(1, 5), second + first, first]
    assert check(caching, cold, sequences, rewards_only=True) == 20
    check(caching, cold, sequences, rewards_only=False)
    assert check(caching, cold, [sequences[0] + draw(2, 6)], rewards_only=False) == 2


@pytest.mark.parametrize(("name", "kernel"), [("llama", "sdpa"), ("gemma2", "eager")])
def test_streams_of_passes_give_what_a_cold_critic_gives(name, kernel):
    cached, cold = critics_of(name, kernel)

    @settings(max_examples=5, deadline=None)
    @given(PASSES)
    def stream(passes):
        caching = CachingCritic(cached, CPU)
        for sequences, rewards_only in passes:
            check(caching, cold, sequences, rewards_only)

    stream()


@pytest.mark.parametrize("rewards_only", [True, False], ids=["rewards", "values"])
def test_a_prompt_is_computed_once_across_calls(critics, rewards_only):
    caching, cold = CachingCritic(critics[0], CPU), critics[1]
    prompt = draw(20, 0)
    computed = [check(caching, cold, [prompt + draw(5, 1 + call)], rewards_only) for call in range(4)]
    assert computed == [25, 5, 5, 5]
    assert caching.figures.hit_tokens == 60
    assert caching.figures.bytes == 40 * critics[0].store.bytes_per_slot
    assert check(caching, cold, [prompt + draw(5, 1), draw(4, 9)], rewards_only) == 5


def test_a_conversation_computes_each_turn_once(critics):
    caching, cold = CachingCritic(critics[0], CPU), critics[1]
    conversation, computed = [], []
    for turn in range(6):
        conversation = conversation + draw(9, turn)
        computed.append(check(caching, cold, [conversation], rewards_only=turn != 5))
    assert computed == [9, 9, 9, 9, 9, 54]  # the values of the last are not known from rewards


def test_sequences_that_share_a_bos_alone_compute_all_their_tokens():
    cached, cold = critics_of("llama", "sdpa")
    assert cached.create_store(300 * cached.store.bytes_per_slot, CPU)
    caching = CachingCritic(cached, CPU)
    first, second = ([1, *draw(50, seed)] for seed in range(2))
    assert [check(caching, cold, [one], True) for one in (first, second)] == [51, 51]
    # The third is computed beside a sequence that uses the cached BOS.
    assert check(caching, cold, [first + draw(4, 2), [1, *draw(50, 3)], second + draw(4, 4)], True) == 58


def test_a_family_without_prefix_trees_runs_without_and_says_so(caplog):
    critic = Critic(random_model(family_configs()["bloom"], "eager"))
    assert not critic.create_store(10**6, CPU)
    assert "no prefix cache for bloom" in caplog.text
    with pytest.raises(ValueError, match="create_store"):
        CachingCritic(critic, CPU)


def test_a_rope_that_depends_on_the_batch_runs_without_and_says_so(caplog):
    config = family_configs()["llama"]
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert not Critic(random_model(config, "sdpa")).create_store(10**6, CPU)
    assert "no prefix cache: the keys of this rope type" in caplog.text


def test_a_cache_that_holds_no_token_is_off_and_says_so(caplog):
    critic = Critic(random_model(family_configs()["llama"], "sdpa"))
    assert not critic.create_store(100, CPU)
    assert "a token needs 388 bytes of at most 100" in caplog.text


def test_bytes_are_counted_exactly():
    critic = Critic(random_model(family_configs()["qwen3"], "sdpa"))
    critic.create_store(10**5, CPU)
    store = critic.store
    tensors = store.tensors
    assert sum(tensor.nbytes for tensor in tensors) == store.slots * store.bytes_per_slot <= 10**5
    store.free()
    assert sum(tensor.nbytes for tensor in tensors) == 0
