"""A scorer with a small prefix cache answers as one without, while callers are concurrent and critics are published."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from actors.serving.scorer import LocalCritic, Scorer
from rlhf_critic.checkpoint.critic_directory import open_critic
from rlhf_critic.config.serve import ScorerConfig

TOLERANCE = 1e-5
CACHE_BYTES = 50_000  # fewer tokens of the tiny critic than a stream has, so that it evicts
ROUNDS = 40


@pytest.fixture(scope="module")
def cold(critics):
    """Scorers without a cache, by the name of their critic."""
    scorers = {
        name: Scorer(ScorerConfig(checkpoint=critics[name], prefix_cache_bytes=0)) for name in ("first", "second")
    }
    yield scorers
    for scorer in scorers.values():
        scorer.close()


def draw_calls(seed, calls):
    """Draws calls of 1 to 3 sequences that begin with one of a few prompts or with a sequence of an earlier call."""
    rng = np.random.default_rng(seed)

    def tokens(most):
        return rng.integers(5, 60, rng.integers(1, most)).tolist()

    earlier = [tokens(30) for _ in range(5)]
    drawn = []
    for _ in range(calls):
        call = [(earlier[rng.integers(len(earlier))] + tokens(12))[:60] for _ in range(rng.integers(1, 4))]
        earlier = [*earlier[-15:], *call]
        drawn.append((call, bool(rng.integers(4) == 0)))
    return drawn


def test_concurrent_callers_and_publishes_get_the_answers_of_a_cold_scorer(critics, cold):
    configs = [ScorerConfig(checkpoint=critics[name], prefix_cache_bytes=CACHE_BYTES) for name in ("first", "second")]
    scorer = Scorer(configs[0])
    calls = draw_calls(0, ROUNDS)
    evicted = hits = 0
    with ThreadPoolExecutor(4) as callers:
        for config in (configs[1], configs[0]):
            answers = [callers.submit(scorer.score, items, values=values) for items, values in calls]
            for answer in answers[: ROUNDS // 2]:
                answer.result(60)
            figures = scorer.info().prefix_cache
            assert 0 < figures.bytes <= figures.max_bytes <= CACHE_BYTES
            evicted, hits = evicted + figures.evicted_tokens, hits + figures.hit_tokens
            scorer.publish(config)
            assert scorer.info().prefix_cache.hit_tokens == 0 or not all(one.done() for one in answers)
            for (items, values), answer in zip(calls, answers, strict=True):
                scores = answer.result(60)
                name = "first" if scores.model_version.startswith("tiny@1#") else "second"
                expected = cold[name].score(items, values=values)
                assert scores.model_version == expected.model_version
                np.testing.assert_allclose(scores.rewards_S, expected.rewards_S, atol=TOLERANCE)
                for found, wanted in zip(scores.values or (), expected.values or (), strict=True):
                    np.testing.assert_allclose(found, wanted, atol=TOLERANCE)
    scorer.close()
    assert evicted > 0, figures
    assert hits > 0, figures


def test_callers_of_single_responses_compute_a_prompt_once(critics):
    records = []
    scorer = Scorer(ScorerConfig(checkpoint=critics["first"]), on_batch=records.append)
    prompt = list(range(5, 35))
    for response in range(4):
        scorer.score([[*prompt, 40 + response]])
    scorer.close()
    assert [record.computed_tokens for record in records] == [31, 1, 1, 1]
    assert [record.hit_tokens for record in records] == [0, 30, 30, 30]
    assert records[-1].cache_bytes > records[0].cache_bytes > 0


def test_zero_bytes_turn_the_cache_off(cold, critics):
    assert cold["first"].info().prefix_cache is None
    assert LocalCritic(open_critic(critics["first"]), 256, use_gpu=False).known_lengths is None


def test_the_memory_of_a_replaced_cache_is_freed(critics):
    scorer = Scorer(ScorerConfig(checkpoint=critics["first"], prefix_cache_bytes=CACHE_BYTES))
    store = scorer._version.backend._critic.store
    scorer.publish(ScorerConfig(checkpoint=critics["second"], prefix_cache_bytes=CACHE_BYTES))
    assert all(tensor.numel() == 0 for tensor in store.tensors)
    scorer.close()
