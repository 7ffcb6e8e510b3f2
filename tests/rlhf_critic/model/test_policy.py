"""Log-probabilities and entropies equal those of plain transformers on each sequence alone, in every family.

Plain transformers is the family's own ``*ForCausalLM`` from ``from_pretrained`` with its full logits. Softmax and
entropy are computed from their definitions in float64.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rlhf_critic.config.model import BodyConfig
from rlhf_critic.data.encoding import load_tokenizer
from rlhf_critic.model.policy import Policy, SampledTokenStats, create_policy, sampling_logits, suppressed_ids
from tests.rlhf_critic.families import family_configs, kernels_of, save_base_model
from tests.rlhf_critic.model.policies import from_the_definition, plain_policy, token_stats

NAMES = sorted(family_configs())
TINY = ["tiny_model", "tied_model"]


def make_rollouts(vocabulary: int) -> tuple[list[list[int]], list[int]]:
    """Returns two prompts with three responses each, longer than the windows of families with windows."""
    rng = np.random.default_rng(0)
    sequences, prompt_lengths = [], []
    for prompt_length in (1, 8):
        prompt = rng.integers(2, vocabulary, prompt_length).tolist()
        for response_length in (1, 5, 11):
            sequences.append(prompt + rng.integers(2, vocabulary, response_length).tolist())
            prompt_lengths.append(prompt_length)
    return sequences, prompt_lengths


def agree(found: SampledTokenStats, expected: SampledTokenStats) -> None:
    for name in SampledTokenStats._fields:
        assert getattr(found, name).dtype == torch.float32
        torch.testing.assert_close(
            getattr(found, name).double(),
            getattr(expected, name),
            rtol=0,
            atol=1e-5,
            msg=lambda text, name=name: name + text,
        )


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, str]:
    """A causal model of every family and variant, on disk."""
    directory = tmp_path_factory.mktemp("policies")
    return {name: save_base_model(name, directory / name) for name in NAMES}


# --- against plain transformers ---


@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("prefix_tree", [True, False])
@pytest.mark.parametrize("fixture", TINY)
def test_log_probs_and_entropies_are_those_of_plain_transformers(request, fixture, prefix_tree, temperature):
    source = request.getfixturevalue(fixture)
    policy = create_policy(BodyConfig(path=source, prefix_tree=prefix_tree), load_tokenizer(source))
    assert policy.prefix_tree == prefix_tree
    rollouts = make_rollouts(300)
    expected = from_the_definition(plain_policy(source), *rollouts, temperature, policy.suppressed)
    agree(token_stats(policy, *rollouts, temperature), expected)
    assert expected.log_probs_A.std() > 0.3  # not all the same
    assert expected.entropies_A.std() > 0.02


@torch.no_grad()
@pytest.mark.parametrize(("name", "kernel"), [(n, k) for n in NAMES for k in kernels_of(family_configs()[n])])
@pytest.mark.parametrize("prefix_tree", [True, False])
def test_every_family_has_the_log_probs_of_plain_transformers(sources, name, kernel, prefix_tree):
    options = BodyConfig(path=sources[name], attn_implementation=kernel, prefix_tree=prefix_tree)
    policy = create_policy(options, load_tokenizer(sources[name]))
    assert policy.prefix_tree == (prefix_tree and name != "bloom")
    rollouts = make_rollouts(300)
    expected = from_the_definition(plain_policy(sources[name]), *rollouts, 0.9, policy.suppressed)
    agree(token_stats(policy, *rollouts, 0.9), expected)
    assert expected.log_probs_A.std() > 0.1


@torch.no_grad()
def test_the_soft_cap_of_gemma2s_logits_is_felt(sources):
    """Gemma2's soft cap bounds logits; without it the distribution would differ."""
    policy = create_policy(BodyConfig(path=sources["gemma2"]), load_tokenizer(sources["gemma2"]))
    rollouts = make_rollouts(300)
    policy.model.config.final_logit_softcapping = 1.0
    model = plain_policy(sources["gemma2"])
    free = from_the_definition(model, *rollouts, 1.0, policy.suppressed)
    model.config.final_logit_softcapping = 1.0
    expected = from_the_definition(model, *rollouts, 1.0, policy.suppressed)
    agree(token_stats(policy, *rollouts), expected)
    assert (expected.log_probs_A - free.log_probs_A).abs().max() > 0.1


# --- gradients ---


def gradients(policy: Policy, entropy_weight: float) -> dict[str, torch.Tensor]:
    """Computes the gradients of a sum in which every response token has another weight."""
    policy.zero_grad()
    drawn = token_stats(policy, *make_rollouts(300), 0.8, entropy_gradient=entropy_weight > 0)
    weights_A = torch.linspace(-1.0, 2.0, len(drawn.log_probs_A))
    (weights_A * (drawn.log_probs_A + entropy_weight * drawn.entropies_A)).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in policy.model.named_parameters()}


@pytest.mark.parametrize("entropy_weight", [0.0, 0.5])
@pytest.mark.parametrize("prefix_tree", [True, False])
@pytest.mark.parametrize("fixture", TINY)
def test_gradients_are_those_of_plain_transformers(request, fixture, prefix_tree, entropy_weight):
    source = request.getfixturevalue(fixture)
    policy = create_policy(BodyConfig(path=source, prefix_tree=prefix_tree), load_tokenizer(source))
    model = plain_policy(source)
    drawn = from_the_definition(model, *make_rollouts(300), 0.8, policy.suppressed)
    weights_A = torch.linspace(-1.0, 2.0, len(drawn.log_probs_A))
    (weights_A * (drawn.log_probs_A + entropy_weight * drawn.entropies_A)).sum().backward()
    found = gradients(policy, entropy_weight)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name][: len(parameter)], parameter.grad, rtol=1e-3, atol=2e-4, msg=name)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"bloom"}))
def test_gradients_over_a_prefix_tree_are_those_of_a_padded_batch(sources, name):
    tree, padded = (
        gradients(create_policy(BodyConfig(path=sources[name], prefix_tree=on), load_tokenizer(sources[name])), 0.5)
        for on in (True, False)
    )
    assert tree.keys() == padded.keys()
    for parameter, expected in padded.items():
        torch.testing.assert_close(tree[parameter], expected, rtol=1e-3, atol=2e-4, msg=parameter)


def test_entropies_have_a_gradient_only_where_it_is_asked_for(tiny_model):
    policy = create_policy(BodyConfig(path=tiny_model), load_tokenizer(tiny_model))
    rollouts = make_rollouts(300)
    without, with_gradient = (token_stats(policy, *rollouts, entropy_gradient=asked) for asked in (False, True))
    assert not without.entropies_A.requires_grad
    assert without.log_probs_A.requires_grad
    assert with_gradient.entropies_A.requires_grad
    torch.testing.assert_close(without.entropies_A, with_gradient.entropies_A)
    with torch.no_grad():
        assert not token_stats(policy, *rollouts, entropy_gradient=True).entropies_A.requires_grad


@pytest.mark.parametrize("with_entropy", [False, True])
def test_logits_in_parts_give_the_same_numbers_and_gradients(tiny_model, with_entropy):
    policy = create_policy(BodyConfig(path=tiny_model), load_tokenizer(tiny_model))
    generator = torch.Generator().manual_seed(0)
    hidden_AD = torch.randn(37, policy.model.config.hidden_size, generator=generator)
    sampled_A = torch.randint(3, 60, (37,), generator=generator)
    found = []
    for at_once in (10, 37):
        inputs = hidden_AD.clone().requires_grad_()
        policy.zero_grad()
        stats = policy._stats_in_parts(inputs, sampled_A, 0.7, with_entropy, at_once)
        (stats.log_probs_A.sum() + (stats.entropies_A.sum() if with_entropy else 0.0)).backward()
        weight = policy.model.get_output_embeddings().weight
        assert inputs.grad is not None
        assert weight.grad is not None
        found.append((*(one.detach() for one in stats), inputs.grad, weight.grad.clone()))
    for parts, whole in zip(*found, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_logits_of_a_bf16_policy_are_not_rounded_to_bf16(tiny_model):
    policy = create_policy(BodyConfig(path=tiny_model, dtype="bfloat16"), load_tokenizer(tiny_model))
    hidden_AD = torch.randn(5, policy.model.config.hidden_size, generator=torch.Generator().manual_seed(0)).bfloat16()
    logits_AV = policy.model.get_output_embeddings()(hidden_AD)
    expected = hidden_AD.double() @ policy.model.get_output_embeddings().weight.double().T
    assert logits_AV.dtype == torch.float32
    torch.testing.assert_close(logits_AV.double(), expected, rtol=1e-5, atol=1e-6)


# --- suppressed ids ---


@torch.no_grad()
def test_probabilities_sum_to_one_over_what_can_be_drawn_and_are_zero_elsewhere(tiny_model):
    tokenizer = load_tokenizer(tiny_model)
    policy = create_policy(BodyConfig(path=tiny_model), tokenizer)
    rows = policy.model.config.vocab_size
    # One rollout for each id of the vocabulary, after the same prompt.
    drawn = token_stats(policy, [[5, 6, 7, token] for token in range(rows)], [3] * rows, 0.7)
    probs_V = drawn.log_probs_A.double().exp()
    assert probs_V.sum().item() == pytest.approx(1.0, abs=1e-5)
    assert [token for token in range(rows) if probs_V[token] == 0.0] == policy.suppressed
    assert torch.isfinite(drawn.log_probs_A).all()
    assert torch.isfinite(drawn.entropies_A).all()


def test_the_pad_token_and_rows_without_a_token_are_suppressed(tiny_model, tied_model):
    for source in (tiny_model, tied_model):  # the second tokenizer's pad token was its EOS
        tokenizer = load_tokenizer(source)
        policy = create_policy(BodyConfig(path=source), tokenizer)
        assert policy.model.config.vocab_size > len(tokenizer)
        nobody = range(len(tokenizer), policy.model.config.vocab_size)
        assert policy.suppressed == [tokenizer.pad_token_id, *nobody]
        assert tokenizer.eos_token_id not in policy.suppressed
    assert suppressed_ids(tokenizer, len(tokenizer)) == [tokenizer.pad_token_id]


def test_sampling_logits_equal_their_definition_and_change_no_argument():
    logits = torch.tensor([[1.0, -2.0, 3.0, 0.5]], dtype=torch.bfloat16)
    found = sampling_logits(logits, 0.5, [1])
    assert found.dtype == torch.float32
    assert found.softmax(-1)[0, 1] == 0.0
    probs = found.softmax(-1)[0].tolist()
    weights = [math.exp(2.0), 0.0, math.exp(6.0), math.exp(1.0)]
    assert probs == pytest.approx([weight / sum(weights) for weight in weights], rel=1e-6)
    assert logits.tolist() == [[1.0, -2.0, 3.0, 0.5]]
    assert torch.equal(sampling_logits(logits.float(), 1.0, []), logits.float())


# --- construction ---


def test_a_policy_has_no_dropout_and_freezes_what_it_is_told(sources, tmp_path):
    tokenizer = load_tokenizer(sources["gpt2"])
    policy = create_policy(BodyConfig(path=sources["gpt2"], freeze_layers=2), tokenizer)
    assert policy.training
    assert {module.p for module in policy.modules() if isinstance(module, torch.nn.Dropout)} <= {0.0}
    frozen = {name for name, parameter in policy.model.named_parameters() if not parameter.requires_grad}
    assert "transformer.wte.weight" in frozen
    assert {name.split(".")[2] for name in frozen if name.startswith("transformer.h.")} == {"0", "1"}
    assert policy.model.transformer.h[2].attn.c_attn.weight.requires_grad


@torch.no_grad()
def test_a_policy_of_the_first_layers_is_what_plain_transformers_makes_of_them(tiny_model):
    policy = create_policy(BodyConfig(path=tiny_model, num_layers=1), load_tokenizer(tiny_model))
    model = plain_policy(tiny_model)
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    rollouts = make_rollouts(300)
    agree(token_stats(policy, *rollouts), from_the_definition(model, *rollouts, 1.0, policy.suppressed))
