"""Samples follow the policy's own distribution, and the same seed gives the same samples."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM

from rlhf_critic.config.model import BodyConfig
from rlhf_critic.data.encoding import load_tokenizer
from rlhf_critic.errors import CheckpointError, DivergedError
from rlhf_critic.model.generation import Response, TransformersGenerator, VllmGenerator, create_generator, stop_ids
from rlhf_critic.model.policy import SUPPRESSED_LOGIT, create_policy
from rlhf_critic.model.weights import persistent_tensors
from tests.helpers import save_tiny_model
from tests.rlhf_critic.families import family_configs, save_base_model
from tests.rlhf_critic.model.policies import token_stats

PROMPTS = [[5], [7, 9, 200, 31, 8, 44, 45, 46], [12, 13, 14], [7, 9, 200]]
MANY = [[5, 6, 7 + row % 50] for row in range(150)]


def make(source: str, temperature: float = 1.0, **options: object) -> TransformersGenerator:
    return TransformersGenerator(
        BodyConfig(path=source, **options), load_tokenizer(source), temperature, torch.device("cpu")
    )


def ids_of(responses: list[Response]) -> list[list[int]]:
    return [response.ids.tolist() for response in responses]


# --- log-probabilities ---


def agree_with_the_policy(source: str, temperature: float, prefix_tree: bool) -> None:
    responses = make(source, temperature).generate(PROMPTS, max_new_tokens=12, seed=1)
    policy = create_policy(BodyConfig(path=source, prefix_tree=prefix_tree), load_tokenizer(source)).eval()
    sequences = [[*ids, *response.ids.tolist()] for ids, response in zip(PROMPTS, responses, strict=True)]
    with torch.no_grad():
        expected = token_stats(policy, sequences, [len(ids) for ids in PROMPTS], temperature).log_probs_A.numpy()
    for response in responses:
        assert response.ids.dtype == np.int64
        assert response.log_probs.dtype == np.float32
        assert response.ids.shape == response.log_probs.shape
    np.testing.assert_allclose(
        np.concatenate([response.log_probs for response in responses]), expected, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("prefix_tree", [True, False])
@pytest.mark.parametrize("fixture", ["tiny_model", "tied_model"])
def test_log_probs_are_those_of_the_policy(request, fixture, temperature, prefix_tree):
    agree_with_the_policy(request.getfixturevalue(fixture), temperature, prefix_tree)


@pytest.mark.parametrize("name", sorted(family_configs()))
def test_every_family_draws_with_the_log_probs_of_its_policy(tmp_path, name):
    """Prompts are padded on the left in generation, but on the right or not at all in the policy."""
    agree_with_the_policy(save_base_model(name, tmp_path), 0.7, prefix_tree=True)


def test_first_tokens_are_drawn_as_often_as_the_policy_says(tiny_model):
    """Pearson's chi-squared test, which detects a wrong temperature."""
    draws, temperature = 2000, 0.7
    responses = make(tiny_model, temperature).generate([[5, 9, 200]] * draws, max_new_tokens=1, seed=0)
    policy = create_policy(BodyConfig(path=tiny_model), load_tokenizer(tiny_model)).eval()
    rows = policy.model.config.vocab_size
    counts_V = np.bincount([int(response.ids[0]) for response in responses], minlength=rows)

    def distance(at_temperature: float) -> float:
        """Returns the deviation of the statistic from its expectation, in standard deviations."""
        with torch.no_grad():
            drawn = token_stats(policy, [[5, 9, 200, token] for token in range(rows)], [3] * rows, at_temperature)
        expected_V = draws * drawn.log_probs_A.double().exp().numpy()
        often = expected_V >= 5
        observed, expected = (
            np.append(numbers_V[often], numbers_V[~often].sum()) for numbers_V in (counts_V, expected_V)
        )
        freedom = len(observed) - 1
        assert freedom > 50
        return (((observed - expected) ** 2 / expected).sum() - freedom) / (2 * freedom) ** 0.5

    assert abs(distance(temperature)) < 4
    assert distance(1.0) > 10


# --- seeds ---


def test_a_seed_gives_the_same_responses_whatever_was_drawn_before(tiny_model):
    generator = make(tiny_model)
    first = generator.generate(PROMPTS, max_new_tokens=10, seed=3)
    generator.generate(MANY[:7], max_new_tokens=5, seed=8)
    torch.rand(5)
    for again in (generator, make(tiny_model)):
        for response, expected in zip(again.generate(PROMPTS, 10, seed=3), first, strict=True):
            np.testing.assert_array_equal(response.ids, expected.ids)
            np.testing.assert_array_equal(response.log_probs, expected.log_probs)
            assert response.truncated == expected.truncated
    assert ids_of(generator.generate(PROMPTS, 10, seed=4)) != ids_of(first)


def test_responses_to_the_same_prompt_differ(tiny_model):
    responses = make(tiny_model).generate([PROMPTS[1]] * 8, max_new_tokens=6, seed=0)
    assert len({tuple(ids) for ids in ids_of(responses)}) == 8


# --- ends ---


def test_a_response_ends_with_eos_or_is_truncated_at_the_most_tokens(tiny_model):
    (eos,) = stop_ids(load_tokenizer(tiny_model))
    most = 30
    responses = make(tiny_model).generate(MANY, most, seed=0)
    ended = [response for response in responses if not response.truncated]
    assert 3 < len(ended) < len(responses) - 3
    for response in responses:
        ids = response.ids.tolist()
        assert len(response.log_probs) == len(ids)
        assert (response.log_probs > -100.0).all()
        if response.truncated:
            assert len(ids) == most
            assert eos not in ids
        else:
            assert 1 <= len(ids) <= most
            assert ids.index(eos) == len(ids) - 1


def test_a_response_that_ends_with_the_last_token_allowed_is_not_truncated(tiny_model):
    generator = make(tiny_model)
    responses = generator.generate(MANY, 30, seed=0)
    row = next(row for row, response in enumerate(responses) if not response.truncated)
    length = len(responses[row].ids)
    again = generator.generate(MANY, length, seed=0)[row]
    assert again.ids.tolist() == responses[row].ids.tolist()
    assert not again.truncated
    if length > 1:
        assert generator.generate(MANY, length - 1, seed=0)[row].truncated


def weights_that_draw(source: str, prompt: list[int], *tokens: int) -> dict[str, torch.Tensor]:
    """Returns weights with which only these tokens follow a prompt, with equal probability."""
    policy = create_policy(BodyConfig(path=source), load_tokenizer(source))
    weights = {name: tensor.detach().clone() for name, tensor in persistent_tensors(policy.model).items()}
    with torch.no_grad():
        hidden_D = policy.hidden(policy.batch_of([prompt]))[-1]
    output_VD = weights["lm_head.weight"].zero_()
    output_VD[list(tokens)] = 100.0 * hidden_D / hidden_D.square().sum()
    return weights


def test_generation_stops_when_all_have_come_to_their_end(tiny_model):
    (eos,) = stop_ids(load_tokenizer(tiny_model))
    generator = make(tiny_model)
    generator.load(weights_that_draw(tiny_model, PROMPTS[1], eos))
    for response in generator.generate([PROMPTS[1]] * 3, 20, seed=0):
        assert response.ids.tolist() == [eos]
        assert response.log_probs == pytest.approx([0.0], abs=1e-5)
        assert not response.truncated


def test_a_turn_may_end_with_another_special_token_than_eos(tiny_model, tmp_path):
    """The tokenizer is like that of chat models whose EOS ends documents, not turns."""
    template = tmp_path / "template.jinja"
    turns = "{% for message in messages %}{{ message['content'] }}ENDING{% endfor %}"
    ids = {token: load_tokenizer(tiny_model).convert_tokens_to_ids(token) for token in ("<unk>", "</s>")}
    for ending, stops in (("<unk>\n", ["<unk>", "</s>"]), ("!\n", ["</s>"]), ("", ["</s>"]), ("</s>", ["</s>"])):
        template.write_text(turns.replace("ENDING", ending))
        tokenizer = load_tokenizer(tiny_model, str(template))
        assert stop_ids(tokenizer) == sorted(ids[token] for token in stops), ending
    tokenizer = load_tokenizer(tiny_model, "plain")
    tokenizer.add_tokens(AddedToken("<|turn|>", special=True))  # without a role, as in many chat models
    tokenizer.chat_template = turns.replace("ENDING", "<|turn|>")
    assert stop_ids(tokenizer) == sorted([tokenizer.convert_tokens_to_ids("<|turn|>"), ids["</s>"]])
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert stop_ids(tokenizer) == [ids["</s>"]]
    template.write_text(turns.replace("ENDING", "<unk>"))
    generator = TransformersGenerator(
        BodyConfig(path=tiny_model), load_tokenizer(tiny_model, str(template)), 1.0, torch.device("cpu")
    )
    generator.load(weights_that_draw(tiny_model, PROMPTS[1], ids["<unk>"]))
    (response,) = generator.generate([PROMPTS[1]], 20, seed=0)
    assert response.ids.tolist() == [ids["<unk>"]]
    assert not response.truncated


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_policy_whose_output_is_no_number_draws_nothing(tiny_model, bad):
    generator = make(tiny_model)
    weights = weights_that_draw(tiny_model, PROMPTS[1], 50)
    weights["lm_head.weight"].fill_(bad)
    generator.load(weights)
    with pytest.raises(DivergedError, match=r"NaN or infinite.*--policy\.optimizer\.learning-rate"):
        generator.generate([PROMPTS[1]] * 3, 20, seed=0)


def test_what_must_not_be_drawn_never_is_however_likely(tiny_model):
    tokenizer = load_tokenizer(tiny_model)
    rows = create_policy(BodyConfig(path=tiny_model), tokenizer).model.config.vocab_size
    forbidden = [tokenizer.pad_token_id, *range(len(tokenizer), rows)]
    assert len(forbidden) > 1
    generator = make(tiny_model)
    generator.load(weights_that_draw(tiny_model, PROMPTS[1], 50, *forbidden))
    responses = generator.generate([PROMPTS[1]] * 200, 1, seed=0)
    assert ids_of(responses) == [[50]] * 200
    for response in responses:  # the probabilities of all tokens that can be sampled sum to 1
        assert response.log_probs == pytest.approx([0.0], abs=1e-5)
    drawn = np.concatenate([response.ids for response in make(tiny_model).generate(MANY, 30, seed=1)])
    assert not np.isin(drawn, forbidden).any()


# --- the model's own settings, and new weights ---


def test_settings_that_a_model_brings_change_nothing(tmp_path):
    plain, cutting = (save_tiny_model(tmp_path / name, tie_word_embeddings=False) for name in ("plain", "cutting"))
    settings = {
        "do_sample": True,
        "top_k": 1,
        "top_p": 0.1,
        "temperature": 0.1,
        "repetition_penalty": 5.0,
        "eos_token_id": list(range(100)),
        "max_new_tokens": 2,
        "suppress_tokens": list(range(100, 200)),
    }
    path = Path(cutting) / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    expected, found = (make(source).generate(MANY, 10, seed=5) for source in (plain, cutting))
    assert ids_of(found) == ids_of(expected)
    for response, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(response.log_probs, other.log_probs)


@pytest.mark.parametrize("tied", [True, False])
def test_new_weights_are_drawn_from_at_once(tmp_path, tied):
    source = save_tiny_model(tmp_path / "old", tie_word_embeddings=tied)
    policy = create_policy(BodyConfig(path=source), load_tokenizer(source))
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    policy.model.save_pretrained(tmp_path / "new")
    load_tokenizer(source).save_pretrained(tmp_path / "new")
    generator, other = make(source), make(str(tmp_path / "new"))
    before = generator.generate(PROMPTS, 10, seed=2)
    generator.load({name: tensor.detach() for name, tensor in persistent_tensors(policy.model).items()})
    expected = other.generate(PROMPTS, 10, seed=2)
    assert ids_of(generator.generate(PROMPTS, 10, seed=2)) == ids_of(expected) != ids_of(before)


def test_weights_that_lack_one_or_have_one_too_many_are_refused(tiny_model):
    generator = make(tiny_model)
    before = generator.generate(PROMPTS, 4, seed=0)
    weights = weights_that_draw(tiny_model, PROMPTS[1], 50)
    for unfit, name in (
        ({key: tensor for key, tensor in weights.items() if key != "lm_head.weight"}, "lm_head.weight"),
        ({**weights, "score.weight": torch.zeros(1, 32)}, "score.weight"),
        ({}, r"lm_head.weight, .* and \d+ more"),
    ):
        with pytest.raises(CheckpointError, match=name):
            generator.load(unfit)
    assert ids_of(generator.generate(PROMPTS, 4, seed=0)) == ids_of(before)


class FakeVllm:
    """The part of vLLM's interface that generation uses: it answers with given ids, and takes weights of its shapes."""

    def __init__(self, path: str, **_: object) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(path)
        self.answer = [5]
        self.settings: list[Any] = []

    def reset_prefix_cache(self) -> None:
        pass

    def apply_model(self, change: Callable[[Any], None]) -> None:
        self.model.load_weights = lambda tensors: self.model.load_state_dict(dict(tensors), strict=False)
        change(self.model)

    def generate(self, inputs: list[Any], settings: list[Any], use_tqdm: bool) -> list[Any]:
        self.settings = settings
        steps = [{token: SimpleNamespace(logprob=-1.0)} for token in self.answer]
        output = SimpleNamespace(token_ids=self.answer, logprobs=steps, finish_reason="stop")
        return [SimpleNamespace(outputs=[output]) for _ in inputs]


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM needs a GPU and is no dependency, so these tests check what this project tells it."""
    kinds = {"LLM": FakeVllm, "SamplingParams": SimpleNamespace}
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(**kinds))
    monkeypatch.setitem(sys.modules, "vllm.inputs", SimpleNamespace(TokensPrompt=dict))


@pytest.mark.usefixtures("vllm")
@pytest.mark.parametrize("fixture", ["tiny_model", "tied_model", "wide_model"])
def test_vllm_excludes_what_the_policy_excludes_and_gets_weights_of_its_shapes(request, tmp_path, fixture):
    """Covers a pad token that was added, one that is EOS, and a base model with more rows than tokens."""
    if fixture == "wide_model":
        source = save_tiny_model(tmp_path / "wide", tie_word_embeddings=False)
        base = AutoModelForCausalLM.from_pretrained(source)
        base.resize_token_embeddings(base.config.vocab_size + 11)
        base.save_pretrained(source)
    else:
        source = request.getfixturevalue(fixture)
    tokenizer = load_tokenizer(source)
    generator = VllmGenerator(BodyConfig(path=source), tokenizer, 1.0)
    engine = generator._llm
    rows = engine.model.config.vocab_size
    generator.generate([[7]], 4, seed=0)
    policy = create_policy(BodyConfig(path=source), tokenizer)
    (settings_of_prompt,) = engine.settings
    assert sorted(settings_of_prompt.logit_bias) == [token for token in policy.suppressed if token < rows]
    assert set(settings_of_prompt.logit_bias.values()) <= {SUPPRESSED_LOGIT}
    assert len(settings_of_prompt.logit_bias) > 10 or fixture != "wide_model"
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(1.0)
    weights = persistent_tensors(policy.model)
    assert policy.model.config.vocab_size > rows or fixture == "wide_model"
    generator.load({name: tensor.detach() for name, tensor in weights.items()})
    for name, tensor in engine.model.state_dict().items():
        if name in weights:
            torch.testing.assert_close(tensor, weights[name][: len(tensor)], rtol=0, atol=0)
    name, *others = weights
    for unfit, given in ((name, others), ("surplus", [*weights, "surplus"])):
        with pytest.raises(CheckpointError, match=f"unknown: {unfit}$"):
            generator.load({key: weights.get(key, weights[name]) for key in given})
    engine.answer = [len(tokenizer)]
    with pytest.raises(CheckpointError, match=rf"vLLM sampled the id {len(tokenizer)}"):
        generator.generate([[7]], 4, seed=0)


def test_without_a_gpu_transformers_generates(tiny_model):
    generator = create_generator(BodyConfig(path=tiny_model), load_tokenizer(tiny_model), 1.0, use_gpu=False)
    assert isinstance(generator, TransformersGenerator)
