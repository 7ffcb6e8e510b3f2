"""DeepSpeed-Chat's interface matches its definition row by row, and handles cases in which the original fails."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from rlhf_critic.model.critic import Critic
from tests.rlhf_critic.families import family_configs, random_model

TOLERANCE = {"rtol": 0.0, "atol": 1e-5}
PAD, BOS = 0, 1
Row = tuple[list[int], list[int]]  # token ids and mask
Padding = Callable[[list[int], int], Row]

PROMPT = [9, 4, 33, 7, 50, 12]
# Each pair is a chosen and a rejected sequence: the tokens with mask 1, in any padded row.
PAIRS = {
    "shared prompt": ([*PROMPT, 8, 9, 10, 2], [*PROMPT, 11, 2]),
    "the longer one is rejected": ([*PROMPT, 5], [*PROMPT, 6, 7, 8, 9, 10, 11, 2]),
    "first tokens differ": ([5, 6, 7], [8, 6, 7, 9]),
    "identical": ([*PROMPT, 8, 2], [*PROMPT, 8, 2]),
    "one token each": ([5], [6]),
    "one begins the other": (PROMPT, [*PROMPT, 8, 2]),
    "one begins the other, which goes on with pad tokens": (PROMPT, [*PROMPT, PAD, PAD, 8]),
    "pad token in the prompt": ([5, PAD, 6, 7, PAD, 8], [5, PAD, 6, 7, PAD, 9, 10]),
    "BOS in front": ([BOS, 5, 6], [BOS, 5, 7]),
    "BOS is all they share": ([BOS, 5, 6], [BOS, 7]),
}
LENGTH = 16


def right(ids: list[int], row: int) -> Row:
    gap = LENGTH - len(ids)
    return ids + [PAD] * gap, [1] * len(ids) + [0] * gap


def left(ids: list[int], row: int) -> Row:
    gap = LENGTH - len(ids)
    return [PAD] * gap + ids, [0] * gap + [1] * len(ids)


def leading_pad(ids: list[int], row: int) -> Row:
    """Returns a masked pad and then the sequence, like OPT's rows with a masked leading token."""
    gap = LENGTH - 1 - len(ids)
    return [PAD, *ids] + [PAD] * gap, [0] + [1] * len(ids) + [0] * gap


def mixed(ids: list[int], row: int) -> Row:
    """Pads every row in another way; every third row has a masked token inside, which is omitted."""
    if row % 3 == 2:
        half = len(ids) // 2
        holed, mask = right([*ids[:half], 2, *ids[half:]], row)
        mask[half] = 0
        return holed, mask
    return (left, right)[row % 3](ids, row)


PADDINGS = [right, left, leading_pad, mixed]


def tensors(sequences: list[list[int]], padding: Padding) -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = zip(*(padding(sequence, row) for row, sequence in enumerate(sequences)), strict=True)
    return torch.tensor(ids), torch.tensor(mask)


def values_alone(model: PreTrainedModel, sequence: list[int]) -> torch.Tensor:
    """Computes the reference values with plain transformers on the bare sequence."""
    backbone = getattr(model, model.base_model_prefix)
    return backbone(input_ids=torch.tensor([sequence])).last_hidden_state[0] @ model.score.weight[0]


def loss_by_definition(chosen: list[int], rejected: list[int], chosen_values: Any, rejected_values: Any) -> Any:
    """Computes the loss token by token from the first difference on; the shorter side repeats its last value."""
    end = max(len(chosen), len(rejected))
    start = 0
    while start < min(len(chosen), len(rejected)) and chosen[start] == rejected[start]:
        start += 1
    start = min(start, end - 1)
    losses = []
    for token in range(start, end):
        advantage = chosen_values[min(token, len(chosen) - 1)] - rejected_values[min(token, len(rejected) - 1)]
        losses.append(torch.log(1 + torch.exp(-advantage)))
    return sum(losses) / len(losses)


@pytest.fixture(scope="module", params=["llama", "opt", "bloom"])
def models(request) -> tuple[Critic, PreTrainedModel]:
    """A critic (with prefix trees, with learned positions, or without trees), and plain transformers."""
    kernel = "eager" if request.param == "bloom" else "sdpa"
    return (
        Critic(random_model(family_configs()[request.param], kernel)).eval(),
        random_model(family_configs()[request.param], kernel),
    )


@pytest.mark.parametrize("padding", PADDINGS)
def test_loss_scores_and_gradients_are_those_of_the_definition(models, padding):
    critic, plain = models
    critic.zero_grad()
    plain.zero_grad()
    chosen, rejected = (list(side) for side in zip(*PAIRS.values(), strict=True))
    ids, mask = tensors([*chosen, *rejected], padding)
    outputs = critic(ids, mask)
    values = [(values_alone(plain, c), values_alone(plain, r)) for c, r in zip(chosen, rejected, strict=True)]
    losses = [loss_by_definition(c, r, *v) for c, r, v in zip(chosen, rejected, values, strict=True)]
    expected = sum(losses) / len(losses)
    assert outputs.keys() == {"loss", "chosen_mean_scores", "rejected_mean_scores"}
    torch.testing.assert_close(outputs["loss"], expected, **TOLERANCE)
    torch.testing.assert_close(outputs["chosen_mean_scores"], torch.stack([v[0][-1] for v in values]), **TOLERANCE)
    torch.testing.assert_close(outputs["rejected_mean_scores"], torch.stack([v[1][-1] for v in values]), **TOLERANCE)
    outputs["loss"].backward()
    expected.backward()
    gradients = dict(critic.model.named_parameters())
    largest = max(parameter.grad.abs().max().item() for parameter in plain.parameters())
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(gradients[name].grad, parameter.grad, rtol=1e-4, atol=1e-5 * largest, msg=name)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("padding", PADDINGS)
def test_a_pair_loses_what_it_loses_alone(models, name, padding):
    critic, plain = models
    chosen, rejected = PAIRS[name]
    ids, mask = tensors([chosen, rejected], padding)
    with torch.no_grad():
        loss = critic(input_ids=ids, attention_mask=mask, use_cache=False)["loss"]
        expected = loss_by_definition(chosen, rejected, values_alone(plain, chosen), values_alone(plain, rejected))
    torch.testing.assert_close(loss, expected, **TOLERANCE)
    assert math.isfinite(loss)


def test_identical_rows_are_a_tie_that_teaches_nothing(models):
    critic, _ = models
    critic.zero_grad()
    ids, mask = tensors(list(PAIRS["identical"]), right)
    loss = critic(ids, mask)["loss"]
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2))
    assert all(p.grad is None or p.grad.abs().max() < 1e-6 for p in critic.parameters())


@torch.no_grad()
@pytest.mark.parametrize("prompt_length", [0, 1, 6, LENGTH])
@pytest.mark.parametrize("padding", PADDINGS)
def test_values_stand_at_their_tokens_and_scores_are_read_at_the_end(models, padding, prompt_length):
    critic, plain = models
    sequences = [sequence for pair in PAIRS.values() for sequence in pair][:-1]  # an odd number is fine here
    ids, mask = tensors(sequences, padding)
    outputs = critic.forward_value(ids, mask, prompt_length=prompt_length, num_padding_at_beginning=1)
    assert outputs.keys() == {"values", "chosen_end_scores"}
    assert outputs["values"].shape == ids.shape
    assert not outputs["values"][mask == 0].any()
    for row, sequence in enumerate(sequences):
        expected = values_alone(plain, sequence)
        torch.testing.assert_close(outputs["values"][row][mask[row].bool()], expected, **TOLERANCE)
        torch.testing.assert_close(outputs["chosen_end_scores"][row], expected[-1], **TOLERANCE)
    only = critic.forward_value(ids, mask, return_value_only=True, use_cache=False)
    assert torch.equal(only, outputs["values"])


@torch.no_grad()
def test_no_token_is_computed_twice(models):
    critic, _ = models
    sequences = [sequence for pair in PAIRS.values() for sequence in pair]
    computed: list[int] = []
    hook = critic.model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: computed.append(inputs[0].numel())
    )
    critic(*tensors(sequences[::2] + sequences[1::2], left))
    hook.remove()
    shared_once = len({tuple(s[: i + 1]) for s in sequences for i in range(len(s))})
    longest = max(map(len, sequences))
    assert computed == [shared_once if critic.prefix_tree else len(sequences) * longest]


def test_gradient_checkpointing_computes_the_same(models):
    critic, _ = models
    ids, mask = tensors([*PAIRS["shared prompt"]], right)
    runs = []
    attention = next(m for name, m in critic.named_modules() if name.endswith(("self_attn", "self_attention")))
    critic.train()
    for switch in (critic.gradient_checkpointing_enable, critic.gradient_checkpointing_disable):
        switch()
        critic.zero_grad()
        passes: list[int] = []
        hook = attention.register_forward_hook(lambda *_, passes=passes: passes.append(1))
        critic(ids, mask)["loss"].backward()
        hook.remove()
        runs.append((len(passes), critic.model.score.weight.grad.clone()))
    critic.eval()
    assert [passes for passes, _ in runs] == [2, 1]
    torch.testing.assert_close(runs[0][1], runs[1][1])


def test_what_has_no_answer_is_refused(models):
    critic, _ = models
    ids, mask = tensors(list(PAIRS["shared prompt"]), right)
    with pytest.raises(ValueError, match=r"attention_mask must have the shape of input_ids, \(2, 16\), not None"):
        critic(ids)
    with pytest.raises(ValueError, match=r"not \(2, 15\)"):
        critic.forward_value(ids, mask[:, 1:])
    with pytest.raises(ValueError, match=r"3 rows: the number is odd"):
        critic(ids[[0, 1, 1]], mask[[0, 1, 1]])
    with pytest.raises(ValueError, match="at least one token"):
        critic.forward_value(ids, mask * torch.tensor([[1], [0]]))
