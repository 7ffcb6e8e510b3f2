"""Value updates equal those of a loop from the definition, on any number of ranks and at any ZeRO stage.

The functions that take a `source` are sent to real ranks (Ray actors) and run there.
"""

from __future__ import annotations

import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from rlhf_critic.config.model import ModelConfig
from rlhf_critic.config.train import TrainConfig
from rlhf_critic.data.encoding import Encoder, load_tokenizer
from rlhf_critic.model.factory import create_critic_model
from rlhf_critic.model.weights import gathered, persistent_tensors
from rlhf_critic.training.critic_engine import CriticEngine
from tests.helpers import STAGES_ON_RANKS, slow_except
from tests.plain_loop import PlainOptimizer
from tests.rlhf_critic.training.rollouts import Rollouts, make_rollouts

UPDATES = 10
ALONE = 6  # number of the update with one rollout
STAGES = slow_except([3], [0, 1, 2, 3])
OPTIONS = TrainConfig(learning_rate=3e-3, warmup_fraction=0.2, weight_decay=0.01, token_budget=40)
CLIPS = [0.2, None]


def rollouts_of(update: int) -> Rollouts:
    rollouts = make_rollouts(update)
    return rollouts.part(1) if update == ALONE else rollouts


def make(
    source: str, stage: int, prefix_tree: bool = True, head_init: str = "normal", **changes: object
) -> CriticEngine:
    encoder = Encoder(load_tokenizer(source), max_length=64)
    model = ModelConfig(path=source, prefix_tree=prefix_tree, head_init=head_init)
    options = OPTIONS.model_copy(update={"zero_stage": stage, **changes})
    return CriticEngine.from_pretrained(encoder, model, options, UPDATES)


def update(engine: CriticEngine, rollouts: Rollouts, clip: float | None) -> dict:
    return asdict(engine.update(rollouts.sequences, rollouts.prompt_lengths, rollouts.targets, rollouts.old, clip))


def train(source: str, stage: int, prefix_tree: bool = True, **changes: object) -> list[list[dict]]:
    """Returns the metrics of each update, by clip."""
    of_clips = []
    for clip in CLIPS:
        engine = make(source, stage, prefix_tree, **changes)
        of_clips.append([update(engine, rollouts_of(number), clip) for number in range(UPDATES)])
    return of_clips


def plain_critic(source: str) -> PreTrainedModel:
    """Loads the model with plain transformers, with the head that the engine initialises."""
    torch.manual_seed(OPTIONS.seed)
    head_1D = create_critic_model(source, load_tokenizer(source), None).model.score.weight.detach()
    model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=1)
    model.score.weight.data.copy_(head_1D)
    return model


def losses_from_the_definition(
    model: PreTrainedModel, rollouts: Rollouts, rollout: int, clip: float | None
) -> list[tuple[torch.Tensor, bool]]:
    """Computes the loss of each response token of one rollout, and whether it is the clipped one."""
    ids, prompt_length = rollouts.sequences[rollout], rollouts.prompt_lengths[rollout]
    values_L = model.base_model(torch.tensor([ids])).last_hidden_state[0] @ model.score.weight[0]
    losses = []
    for action in range(len(ids) - prompt_length):
        value = values_L[prompt_length + action - 1]  # the value before the token is sampled
        target, old = float(rollouts.targets[rollout][action]), float(rollouts.old[rollout][action])
        square = (value - target) ** 2
        near_square = square if clip is None else (value.clamp(old - clip, old + clip) - target) ** 2
        losses.append((torch.maximum(square, near_square) / 2, bool(near_square > square)))
    return losses


@pytest.fixture(scope="module")
def reference(tiny_model) -> list[list[tuple[float, float, float]]]:
    """Loss, gradient norm and clip fraction of each update of a plain loop, by clip, one rollout at a time."""
    of_clips = []
    for clip in CLIPS:
        model = plain_critic(tiny_model)
        optimizer = PlainOptimizer(model, "cosine", 2, UPDATES)
        metrics = []
        for number in range(UPDATES):
            rollouts = rollouts_of(number)
            actions = sum(len(row) for row in rollouts.targets)
            total, clipped = 0.0, 0
            for rollout in range(len(rollouts.sequences)):
                losses = losses_from_the_definition(model, rollouts, rollout, clip)
                if losses:
                    loss = sum(loss for loss, _ in losses) / actions
                    loss.backward()
                    total += loss.item()
                    clipped += sum(is_clipped for _, is_clipped in losses)
            metrics.append((total, optimizer.step(), clipped / actions))
        of_clips.append(metrics)
    return of_clips


@pytest.mark.parametrize(("stage", "world_size"), STAGES_ON_RANKS)
def test_updates_are_those_of_a_plain_loop(ranks, tiny_model, reference, world_size, stage):
    of_ranks = ranks(world_size).run(train, tiny_model, stage)
    for of_clip, expected in zip(of_ranks[0], reference, strict=True):
        losses, norms, fractions = zip(*expected, strict=True)
        np.testing.assert_allclose([metrics["loss"] for metrics in of_clip], losses, rtol=1e-4)
        np.testing.assert_allclose([metrics["grad_norm"] for metrics in of_clip], norms, rtol=1e-3)
        np.testing.assert_allclose([metrics["clip_fraction"] for metrics in of_clip], fractions, rtol=1e-12)
        assert [metrics["step"] for metrics in of_clip] == list(range(1, UPDATES + 1))
        for number, metrics in enumerate(of_clip):
            assert metrics["tokens"] == sum(len(ids) for ids in rollouts_of(number).sequences)
    assert all(other == of_ranks[0] for other in of_ranks[1:])


def test_the_clip_is_felt_by_some_actions_and_by_none_without_it(reference):
    clipped, free = ([fraction for _, _, fraction in of_clip] for of_clip in reference)
    assert max(clipped) > 0.2
    assert min(clipped) < 0.8
    assert set(free) == {0.0}


@pytest.mark.parametrize("prefix_tree", slow_except([True], [True, False]))
@pytest.mark.parametrize("changes", [{"token_budget": 10_000}, {"gradient_checkpointing": True}], ids=str)
def test_neither_batches_nor_checkpointing_change_a_loss(ranks, tiny_model, reference, prefix_tree, changes):
    for of_rank in ranks(2).run(train_with, tiny_model, prefix_tree, changes):
        for of_clip, expected in zip(of_rank, reference, strict=True):
            losses, norms, fractions = zip(*expected, strict=True)
            np.testing.assert_allclose([metrics["loss"] for metrics in of_clip], losses, rtol=1e-4)
            np.testing.assert_allclose([metrics["grad_norm"] for metrics in of_clip], norms, rtol=1e-3)
            np.testing.assert_allclose([metrics["clip_fraction"] for metrics in of_clip], fractions, rtol=1e-12)


def train_with(source: str, prefix_tree: bool, changes: dict) -> list[list[dict]]:
    return train(source, 2, prefix_tree, **changes)


def update_once(source: str, stage: int, rollouts: Rollouts, changes: dict) -> dict:
    return update(make(source, stage, **changes), rollouts, 0.2)


@pytest.mark.parametrize("stage", STAGES)
def test_ranks_without_work_wait_for_the_others(ranks, tiny_model, stage):
    """With one rollout for two ranks, one of them computes only a dummy."""
    alone = make_rollouts(0).part(7)
    (expected,) = ranks(1).run(update_once, tiny_model, 0, alone, {})
    for metrics in ranks(2).run(update_once, tiny_model, stage, alone, {}):
        assert metrics["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert metrics["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
        assert metrics["clip_fraction"] == expected["clip_fraction"]
        assert metrics["tokens"] == expected["tokens"]
        assert metrics["computed_tokens"] == 2 * expected["computed_tokens"]  # the dummy counts


def test_what_rollouts_share_is_computed_once_and_last_tokens_are_not_computed(ranks, tiny_model):
    rollouts = make_rollouts(0)
    (metrics,) = ranks(1).run(update_once, tiny_model, 0, rollouts, {"token_budget": 10_000})
    distinct = set()
    for ids, prompt_length in zip(rollouts.sequences, rollouts.prompt_lengths, strict=True):
        if len(ids) > prompt_length:
            distinct |= {tuple(ids[:length]) for length in range(1, len(ids))}
    assert metrics["computed_tokens"] == len(distinct)
    assert metrics["tokens"] == sum(len(ids) for ids in rollouts.sequences) > 1.5 * len(distinct)


def test_rollouts_with_empty_responses_add_nothing(ranks, tiny_model):
    rollouts = make_rollouts(0)
    kept = [row for row, targets in enumerate(rollouts.targets) if len(targets)]
    assert len(kept) < len(rollouts.targets)
    (metrics,) = ranks(1).run(update_once, tiny_model, 0, rollouts, {})
    (without,) = ranks(1).run(update_once, tiny_model, 0, rollouts.part(*kept), {})
    assert {**metrics, "tokens": 0} == {**without, "tokens": 0}


def whole_weights(engine: CriticEngine) -> dict[str, torch.Tensor]:
    weights = {}
    for name, tensor in persistent_tensors(engine.critic.model).items():
        with gathered(tensor):
            weights[name] = tensor.detach().clone()
    return weights


def weights_around_an_update(source: str, stage: int, prefix_tree: bool) -> list[dict[str, torch.Tensor]]:
    """With epsilon 1, AdamW's first step of rate 1 moves a weight by g / (|g| + 1), which reveals the gradient g."""
    engine = make(
        source,
        stage,
        prefix_tree,
        learning_rate=1.0,
        schedule="constant",
        warmup_fraction=0.0,
        weight_decay=0.0,
        adam_epsilon=1.0,
        max_grad_norm=0.0,
    )
    before = whole_weights(engine)
    update(engine, make_rollouts(0), 0.2)
    return [before, whole_weights(engine)]


@pytest.mark.parametrize("prefix_tree", [True, False])
@pytest.mark.parametrize("stage", slow_except([2], [0, 2, 3]))
def test_every_gradient_is_that_of_autograd_over_single_rollouts(ranks, tiny_model, stage, prefix_tree):
    model, rollouts = plain_critic(tiny_model), make_rollouts(0)
    actions = sum(len(row) for row in rollouts.targets)
    for rollout in range(len(rollouts.sequences)):
        losses = losses_from_the_definition(model, rollouts, rollout, 0.2)
        if losses:
            (sum(loss for loss, _ in losses) / actions).backward()
    before, after = ranks(2).run(weights_around_an_update, tiny_model, stage, prefix_tree)[0]
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert expected.keys() == before.keys()
    for name, gradient in expected.items():
        moved = (before[name] - after[name])[: len(gradient)]  # without the padding rows of the vocabulary
        torch.testing.assert_close(moved, gradient / (gradient.abs() + 1), rtol=1e-3, atol=2e-6, msg=name)
    assert max(gradient.abs().max() for gradient in expected.values()) > 0.1


def refuse(source: str, stage: int) -> list[dict]:
    """Returns the metrics of an update after rejected bad inputs, and without any bad input."""
    good = make_rollouts(0)
    not_a_number = [row.copy() for row in good.old]
    not_a_number[6][-1] = math.nan
    short = [row[:-1] if index == 7 else row for index, row in enumerate(good.targets)]
    bad = [
        (replace(good, prompt_lengths=[0, *good.prompt_lengths[1:]]), 0.2, "rollout 0: a prompt of 0 tokens"),
        (replace(good, targets=short), 0.2, "rollout 7: returns has the shape"),
        (replace(good, old=not_a_number), 0.2, "rollout 6: old_values is nan at action"),
        (replace(good, old=good.old[:-1]), 0.2, "12 rollouts, but old_values has 11 entries"),
        (good.part(0), 0.2, "no rollout has a response token"),
        (good.part(), 0.2, "no rollout has a response token"),
        (good, 0.0, "the clip of values must be positive"),
        (good, -0.2, "the clip of values must be positive"),
        (good, math.nan, "the clip of values must be positive"),
    ]
    engine, undisturbed = make(source, stage), make(source, stage)
    for rollouts, clip, message in bad:
        with pytest.raises(ValueError, match=message):
            update(engine, rollouts, clip)
        assert engine.step == 0
    return [update(engine, good, 0.2), update(undisturbed, good, 0.2)]


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_bad_is_refused_and_leaves_the_engine_as_it_was(ranks, tiny_model, stage):
    for after, undisturbed in ranks(2).run(refuse, tiny_model, stage):
        assert after == undisturbed


def values_and_update(source: str, stage: int) -> tuple[list[np.ndarray], dict]:
    engine, rollouts = make(source, stage, head_init="zero"), make_rollouts(0)
    return engine.values(rollouts.sequences), update(engine, rollouts, None)


@pytest.mark.parametrize("stage", [0, 3])
def test_a_head_of_zeros_expects_nothing_at_first(ranks, tiny_model, stage):
    rollouts = make_rollouts(0)
    for values, metrics in ranks(2).run(values_and_update, tiny_model, stage):
        assert [len(row) for row in values] == [len(ids) for ids in rollouts.sequences]
        assert not np.concatenate(values).any()
        targets = np.concatenate(rollouts.targets).astype(np.float64)
        assert metrics["loss"] == pytest.approx(np.mean(targets**2) / 2, rel=1e-6)
