"""Traces of several turns: what the policy sampled, what an environment answered, and how they end."""

import numpy as np
import pytest
import torch

from actors.ppo.traces import load_environment, sample_traces
from rlhf_critic.config.model import BodyConfig
from rlhf_critic.data.encoding import load_tokenizer
from rlhf_critic.errors import ConfigError
from rlhf_critic.model.generation import TransformersGenerator
from tests.rlhf_critic.model.policies import from_the_definition, plain_policy

PROMPTS = ["please explain", "why"]
TOKENS, SEED = 40, 3


@pytest.fixture(scope="module")
def sampled(tiny_model):
    """A function that samples traces with an environment."""
    tokenizer = load_tokenizer(tiny_model, "plain")
    generator = TransformersGenerator(BodyConfig(path=tiny_model), tokenizer, 1.0, torch.device("cpu"))
    # Many tokens end a turn, so that turns are short.
    generator._stop = generator._policy.model.generation_config.eos_token_id = list(range(3, 100))
    ids = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in PROMPTS]

    def sample(environment, max_turns=3, max_tokens=TOKENS):
        traces = sample_traces(generator, tokenizer, PROMPTS, ids, max_tokens, SEED, environment, max_turns)
        return traces, ids, generator, tokenizer

    return sample


def cut(length):
    """Makes an environment that remembers what it was asked, ends long traces and rewards turns by their number."""
    asked = []

    def answer(prompts, transcripts):
        asked.append((prompts, transcripts))
        return [(None if len(texts) > length else "tell me more", float(len(texts))) for texts in transcripts]

    return answer, asked


def test_without_an_environment_a_trace_is_what_the_generator_samples(sampled):
    traces, ids, generator, _ = sampled(None)
    for trace, response in zip(traces, generator.generate(ids, TOKENS, SEED), strict=True):
        np.testing.assert_array_equal(trace.ids, response.ids)
        np.testing.assert_array_equal(trace.log_probs, response.log_probs)
        assert (trace.mask, trace.token_rewards, trace.truncated) == (None, None, response.truncated)


def test_answers_stand_between_the_turns_and_are_masked(sampled, tiny_model):
    environment, asked = cut(1)
    traces, ids, generator, tokenizer = sampled(environment, max_tokens=80)
    answer = tokenizer("tell me more", add_special_tokens=False)["input_ids"]
    assert asked[0][0] == PROMPTS
    assert max(len(trace.texts) for trace in traces) == 3
    for prompt, trace in zip(ids, traces, strict=True):
        assert not trace.truncated
        first, between, last = trace._ids
        assert between.tolist() == answer
        assert trace.mask.tolist() == [True] * len(first) + [False] * len(answer) + [True] * len(last)
        assert trace.token_rewards[trace.token_rewards != 0].tolist() == [1.0, 3.0]
        assert trace.token_rewards[len(first) - 1] == 1.0
        assert trace.token_rewards[-1] == 3.0
        assert not trace.log_probs[~trace.mask].any()
        suppressed = generator._policy.suppressed
        sequence = [*prompt, *trace.ids.tolist()]
        drawn = from_the_definition(plain_policy(tiny_model), [sequence], [len(prompt)], 1.0, suppressed)
        np.testing.assert_allclose(trace.log_probs[trace.mask], drawn.log_probs_A.detach()[trace.mask], atol=1e-4)


def test_a_trace_that_would_continue_at_a_limit_is_truncated(sampled):
    environment, _ = cut(100)
    traces, *_ = sampled(environment, max_turns=2, max_tokens=80)
    assert all(trace.truncated and len(trace.texts) == 3 for trace in traces)
    traces, *_ = sampled(environment, max_turns=50, max_tokens=TOKENS)
    assert all(trace.truncated and len(trace) <= TOKENS for trace in traces)
    assert all(trace._is_sampled[-1] for trace in traces), "an answer without a turn after it is left out"


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (lambda *_: [None], "returned 1 answers for 2 traces"),
        (lambda *_: [3, None], r"returned \(3, 0.0\)"),
        (lambda *_: [(None, float("nan")), None], r"returned \(None, nan\)"),
        (lambda *_: 1 / 0, "rollout.environment failed: ZeroDivisionError"),
    ],
)
def test_what_is_no_answer_is_refused(sampled, environment, message):
    with pytest.raises(ConfigError, match=message):
        sampled(environment)


def test_an_environment_that_cannot_be_imported_is_refused():
    assert load_environment(None) is None
    assert load_environment("tests.jobs.ppo_rules:echoes").__name__ == "echoes"
    with pytest.raises(ConfigError, match="'nowhere:tool' cannot be imported: ModuleNotFoundError"):
        load_environment("nowhere:tool")
    with pytest.raises(ConfigError, match="is not a function"):
        load_environment("tests.jobs.ppo_rules:HANG")
