"""Values and gradients through a prefix tree equal those of each sequence alone, in every family and kernel."""

import logging

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from rlhf_critic.batching.padded import PaddedBatch
from rlhf_critic.batching.prefix_tree_batch import PrefixTreeBatch
from rlhf_critic.model.attention_plan import AttentionPlan
from rlhf_critic.model.block_attention import fused_attention, plain_attention
from rlhf_critic.model.critic import Critic
from rlhf_critic.model.factory import stop_sampling_experts
from rlhf_critic.model.prefix_attention import PREFIX_TREE_FAMILIES
from tests.helpers import slow_except
from tests.rlhf_critic.families import VOCABULARY, WINDOW, family_configs, kernels_of, random_model

TOLERANCE = {"rtol": 0.0, "atol": 1e-5}
TOKENS = st.integers(3, 6)  # few, so that prefixes are often shared
SEQUENCES = st.lists(st.lists(TOKENS, min_size=1, max_size=20), min_size=1, max_size=8)
CASES = [(name, kernel) for name, config in family_configs().items() for kernel in kernels_of(config)]
# In `make test`: each kernel in the oldest families, and one kernel where families differ in other ways.
QUICK = {"llama", "mistral-window", "gemma2", "phi3", "gpt2", "gpt_neox", "opt", "bloom", "gpt_oss"}
MARKED = slow_except(
    [case for case in CASES if case[0] in QUICK or case == ("mixtral", "sdpa")], CASES, of_fixture=True
)


def draw(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, VOCABULARY, length).tolist()


PROMPT = draw(12)
NO_PREFIX = [draw(5, 1), draw(7, 2), draw(1, 3)]
CONTAINED = [PROMPT, PROMPT[:5], PROMPT + draw(4, 4), PROMPT[:1]]
DUPLICATES = [[*PROMPT, 9], [*PROMPT, 9], PROMPT, PROMPT]
NESTED = [PROMPT[:7] + draw(3, 5), PROMPT + draw(9, 6), PROMPT[:7] + draw(8, 7), PROMPT + draw(2, 8), draw(3, 9)]
ONE_TOKEN = [[5]]
MANY_BRANCHES = [PROMPT + draw(1 + branch % 7, 100 + branch) for branch in range(1000)]


class Plain(torch.nn.Module):
    """Reference: transformers' own model and modules on padded rows, with the head as a product in fp32."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def values(self, sequences: list[list[int]]) -> torch.Tensor:
        padded = PaddedBatch.from_sequences(sequences, 0)
        ids, mask = padded.input_ids_SL, padded.attention_mask_SL
        backbone = getattr(self.model, self.model.base_model_prefix)
        return (backbone(input_ids=ids, attention_mask=mask).last_hidden_state @ self.model.score.weight[0]).float()


@pytest.fixture(scope="module", params=MARKED, ids=["-".join(case) for case in CASES])
def critics(request) -> tuple[Critic, Plain]:
    """Returns a critic, and the same weights in plain transformers."""
    name, kernel = request.param
    packed = Critic(random_model(family_configs()[name], kernel)).eval()
    stop_sampling_experts(packed.model)  # gradients are taken in training mode
    plain = Plain(random_model(family_configs()[name], kernel)).eval()
    assert packed.prefix_tree == (name != "bloom")
    assert plain.model.config._attn_implementation == kernel
    return packed, plain


def assert_values_are_those_alone(critics: tuple[Critic, Plain], sequences: list[list[int]]) -> None:
    packed, plain = critics
    batch = packed.batch_of(sequences)
    assert isinstance(batch, PrefixTreeBatch if packed.prefix_tree else PaddedBatch)
    values_SL, rewards_S = packed.values(batch), packed.rewards(batch)
    for row, sequence in enumerate(sequences):
        (expected,) = plain.values([sequence])
        torch.testing.assert_close(values_SL[row, : len(sequence)], expected, **TOLERANCE)
        torch.testing.assert_close(rewards_S[row], expected[-1], **TOLERANCE)


@torch.no_grad()
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sequences=SEQUENCES)
@example(sequences=NO_PREFIX)
@example(sequences=CONTAINED)
@example(sequences=DUPLICATES)
@example(sequences=NESTED)
@example(sequences=ONE_TOKEN)
def test_values_at_every_token_are_those_of_the_sequence_alone(critics, sequences):
    assert_values_are_those_alone(critics, sequences)


@torch.no_grad()
def test_a_thousand_branches(critics):
    packed, plain = critics
    batch = packed.batch_of(MANY_BRANCHES)
    if packed.prefix_tree:
        assert batch.computed_tokens == len({tuple(s[: i + 1]) for s in MANY_BRANCHES for i in range(len(s))})
    expected_SL = plain.values(MANY_BRANCHES)
    values_SL, rewards_S = packed.values(batch), packed.rewards(batch)
    for row, sequence in enumerate(MANY_BRANCHES):
        torch.testing.assert_close(values_SL[row, : len(sequence)], expected_SL[row, : len(sequence)], **TOLERANCE)
        torch.testing.assert_close(rewards_S[row], expected_SL[row, len(sequence) - 1], **TOLERANCE)


def gradients(module: torch.nn.Module, output: torch.Tensor) -> dict[str, torch.Tensor]:
    """Computes the gradients of a loss in which every reward of `NESTED`, or every value, has a different weight."""
    module.zero_grad()
    weights = torch.linspace(-1.0, 1.0, output.numel()).view(output.shape)
    if output.dim() == 2:
        longest = output.shape[1]
        weights *= torch.tensor([[1.0] * len(s) + [0.0] * (longest - len(s)) for s in NESTED])
    (output.sin() * weights).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in module.named_parameters()}


@pytest.mark.parametrize("rewards_only", [True, False], ids=["rewards", "values"])
@pytest.mark.parametrize("gradient_checkpointing", [False, True], ids=["kept", "checkpointed"])
def test_gradients_are_those_of_the_padded_batch(critics, rewards_only, gradient_checkpointing):
    packed, plain = critics
    packed.train()
    passes = []
    attention = next(m for name, m in packed.named_modules() if name.endswith((".attn", "attention", ".self_attn")))
    hook = attention.register_forward_hook(lambda *_: passes.append(1))
    if gradient_checkpointing:
        packed.model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        found = gradients(packed, packed(packed.batch_of(NESTED), rewards_only=rewards_only))
    finally:
        hook.remove()
        packed.model.gradient_checkpointing_disable()
        packed.eval()
    assert len(passes) == (2 if gradient_checkpointing else 1)
    values_SL = plain.values(NESTED)
    ends_S = torch.tensor([len(sequence) - 1 for sequence in NESTED])
    expected = gradients(plain, values_SL.gather(1, ends_S[:, None])[:, 0] if rewards_only else values_SL)
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in expected.items():
        # A gradient that is zero by symmetry, such as that of a key's bias, is rounding noise on both sides.
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * largest, msg=name)


@torch.no_grad()
def test_plain_transformers_still_works_on_a_critic_with_prefix_trees(critics):
    packed, plain = critics
    packed.rewards(packed.batch_of(NESTED))  # leaves no state that affects a plain call
    padded = PaddedBatch.from_sequences(NESTED, 0)
    expected_SL, real_SL = plain.values(NESTED), padded.attention_mask_SL.bool()
    torch.testing.assert_close(packed.values(padded)[real_SL], expected_SL[real_SL], **TOLERANCE)
    ends_S = torch.tensor([len(sequence) - 1 for sequence in NESTED])
    torch.testing.assert_close(packed.rewards(padded), expected_SL.gather(1, ends_S[:, None])[:, 0], **TOLERANCE)


# The kernels alone, against one dense mask.


def dense_attention(plan: AttentionPlan, for_leaves: bool, window: int | None, softcap: float | None) -> torch.Tensor:
    """Computes attention by definition: softmax over the tokens of the path, with a T x T mask."""
    query, key, value = tensors(plan)
    size, group = len(plan.tree), query.shape[1] // key.shape[1]
    visible_TT = torch.zeros(size, size, dtype=torch.bool)
    for token in range(size):
        path = plan.tree.path_tokens(token)
        visible_TT[token, path[-window:] if window else path] = True
    scores = query @ key.repeat_interleave(group, 1).transpose(2, 3) * 0.3
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~visible_TT, float("-inf")).softmax(-1)
    output = (weights @ value.repeat_interleave(group, 1)).transpose(1, 2)
    return output[:, plan.leaf_tokens_R] if for_leaves else output


def tensors(plan: AttentionPlan) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(1, heads, len(plan.tree), 8, generator=generator, requires_grad=True) for heads in (6, 2, 2)]


@pytest.mark.parametrize("for_leaves", [False, True], ids=["every token", "leaves"])
@pytest.mark.parametrize(
    ("kernel", "window", "softcap"),
    [(fused_attention, None, None), (plain_attention, None, None), (plain_attention, WINDOW, 2.0)],
    ids=["fused", "plain", "plain window softcap"],
)
def test_kernels_compute_attention_under_the_dense_mask(kernel, window, softcap, for_leaves):
    plan = AttentionPlan(PrefixTreeBatch.from_sequences(NESTED + CONTAINED), for_leaves)
    query, key, value = (tensor.detach() for tensor in tensors(plan))
    asking = query[:, :, plan.leaf_tokens_R] if for_leaves else query
    options = {"scaling": 0.3, "softcap": softcap, "sliding_window": window}
    output = kernel(torch.nn.Module(), asking, key, value, plan, for_leaves, options)
    torch.testing.assert_close(output, dense_attention(plan, for_leaves, window, softcap).detach(), **TOLERANCE)


def test_fused_kernel_works_in_bf16():
    plan = AttentionPlan(PrefixTreeBatch.from_sequences(NESTED + CONTAINED), False)
    query, key, value = (tensor.detach().bfloat16().requires_grad_() for tensor in tensors(plan))
    output = fused_attention(torch.nn.Module(), query, key, value, plan, False, {"scaling": 0.3})
    assert output.dtype == torch.bfloat16
    expected = dense_attention(plan, False, None, None)
    torch.testing.assert_close(output.float(), expected, rtol=0.0, atol=0.03)
    output.float().square().sum().backward()
    assert all(torch.isfinite(tensor.grad).all() for tensor in (query, key, value))


def test_no_token_is_computed_twice_and_the_last_layer_only_where_it_is_read():
    packed = Critic(random_model(family_configs()["llama"], "sdpa")).eval()
    seen: dict[str, list[int]] = {}
    for name, module in packed.model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(
                lambda _, inputs, name=name: seen.setdefault(name, []).append(inputs[0].shape[-2])
            )
    batch = packed.batch_of(NESTED)
    tokens = len({tuple(s[: i + 1]) for s in NESTED for i in range(len(s))})
    packed.rewards(batch)
    last = "model.layers.2."
    for name, rows in seen.items():
        skipped = name.startswith(last) and name.removeprefix(last).startswith(
            ("self_attn.q_proj", "self_attn.o_proj", "mlp")
        )
        assert rows == [len(NESTED) if skipped else tokens], name
    seen.clear()
    packed.values(batch)
    assert {tuple(rows) for rows in seen.values()} == {(tokens,)}


@torch.no_grad()
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_attention_dropout_is_applied_in_training_only(kernel):
    model = random_model(family_configs()["llama"], kernel)
    critic = Critic(model)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    batch = critic.batch_of(NESTED)
    in_training = [critic.train().rewards(batch) for _ in range(2)]
    outside = [critic.eval().rewards(batch) for _ in range(2)]
    assert not torch.equal(*in_training)
    assert torch.equal(*outside)


def test_a_second_critic_of_the_same_model_has_prefix_trees_too():
    model = random_model(family_configs()["llama"], "sdpa")
    first = Critic(model).eval()
    with torch.no_grad():
        expected = first.rewards(first.batch_of(NESTED))
        second = Critic(model).eval()
        assert second.prefix_tree
        assert torch.equal(second.rewards(second.batch_of(NESTED)), expected)


def test_families_that_cannot_take_trees_say_so_once(caplog):
    with caplog.at_level(logging.WARNING, logger="rlhf_critic.model.critic"):
        critic = Critic(random_model(family_configs()["bloom"], "eager"))
        for _ in range(3):
            critic.rewards(critic.batch_of(NESTED))
    assert [record.message for record in caplog.records if "padded" in record.message] == [caplog.records[0].message]
    assert "bloom" in caplog.records[0].message


def test_positions_that_depend_on_the_batch_are_warned_of(caplog):
    config = family_configs()["llama"]
    config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    with caplog.at_level(logging.WARNING, logger="rlhf_critic.model.critic"):
        Critic(random_model(config, "sdpa"))
    assert [record for record in caplog.records if "'dynamic'" in record.message]


def test_the_families_of_the_table_are_those_tested():
    tested = {config.model_type for config in family_configs().values()} - {"bloom"}
    assert tested == PREFIX_TREE_FAMILIES
