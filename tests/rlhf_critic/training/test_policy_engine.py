"""The policy trains on any number of ranks and at any ZeRO stage like a loop from the definition of PPO.

The loop uses the family's own ``*ForCausalLM`` from ``from_pretrained``, one rollout at a time. The functions that take
a `source` are sent to real ranks (Ray actors) and run there.
"""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from rlhf_critic.checkpoint.critic_directory import RESUME_FOLDER
from rlhf_critic.config.model import BodyConfig, OptimizerConfig
from rlhf_critic.data.encoding import load_tokenizer
from rlhf_critic.errors import CheckpointError
from rlhf_critic.model.policy import create_policy
from rlhf_critic.training.policy_engine import PolicyEngine
from tests.helpers import STAGES_ON_RANKS, slow_except
from tests.plain_loop import PlainOptimizer
from tests.rlhf_critic.families import NAMES, save_base_model
from tests.rlhf_critic.model.policies import from_the_definition, plain_policy
from tests.rlhf_critic.training.rollouts import Rollouts, make_rollouts

UPDATES = 5
STAGES = slow_except([3], [0, 1, 2, 3])
CLIP = 0.2
TEMPERATURE = 0.8
COEFFICIENTS = [0.0, 0.05]  # of the entropy
OPTIONS = OptimizerConfig(
    learning_rate=5e-4, schedule="linear", warmup_fraction=0.2, weight_decay=0.01, token_budget=40
)


def make(source: str, stage: int, prefix_tree: bool = True, **changes: object) -> PolicyEngine:
    options = OPTIONS.model_copy(update={"zero_stage": stage, **changes})
    model = BodyConfig(path=source, prefix_tree=prefix_tree)
    return PolicyEngine(load_tokenizer(source), model, options, 2 * UPDATES, 0, TEMPERATURE)


def update(engine: PolicyEngine, rollouts: Rollouts, coefficient: float = 0.0, clip: float = CLIP) -> dict:
    return asdict(
        engine.update(rollouts.sequences, rollouts.prompt_lengths, rollouts.old, rollouts.targets, clip, coefficient)
    )


def reference_of(engine: PolicyEngine, rollouts: Rollouts) -> list[np.ndarray]:
    return engine.reference_log_probs(rollouts.sequences, rollouts.prompt_lengths)


def drawn_rollouts(engine: PolicyEngine) -> Rollouts:
    """Returns the rollouts with the policy's log-probabilities as old ones; initially they are the reference's."""
    rollouts = make_rollouts(0)
    return replace(rollouts, old=reference_of(engine, rollouts))


def train(source: str, stage: int, prefix_tree: bool = True, changes: dict | None = None) -> list[tuple]:
    """Returns, by entropy coefficient, the metrics of each update and the reference's log-probs before and after."""
    of_coefficients = []
    for coefficient in COEFFICIENTS:
        engine = make(source, stage, prefix_tree, **(changes or {}))
        rollouts = drawn_rollouts(engine)
        metrics = [update(engine, rollouts, coefficient) for _ in range(UPDATES)]
        of_coefficients.append((metrics, rollouts.old, reference_of(engine, rollouts)))
    return of_coefficients


def never_drawn(source: str) -> list[int]:
    """Returns the pad token, and the rows of a padded vocabulary that plain transformers does not have."""
    return create_policy(BodyConfig(path=source), load_tokenizer(source)).suppressed


def action_log_probs(model: PreTrainedModel, source: str, rollouts: Rollouts) -> np.ndarray:
    """Computes the statistics of all response tokens from the definition."""
    with torch.no_grad():
        drawn = from_the_definition(
            model, rollouts.sequences, rollouts.prompt_lengths, TEMPERATURE, never_drawn(source)
        )
    return drawn.log_probs_A.numpy()


@pytest.fixture(scope="module")
def reference(tiny_model) -> list[dict[str, list[float]]]:
    """Metrics of a plain loop at each update, by entropy coefficient."""
    suppressed = never_drawn(tiny_model)
    rollouts = make_rollouts(0)
    advantages_A = torch.from_numpy(np.concatenate(rollouts.targets)).double()
    of_coefficients = []
    for coefficient in COEFFICIENTS:
        model = plain_policy(tiny_model)
        optimizer = PlainOptimizer(model, "linear", 2, 2 * UPDATES, OPTIONS.learning_rate)
        old_A = None
        measured: dict[str, list[float]] = {
            name: [] for name in ("loss", "grad_norm", "clip_fraction", "entropy", "approx_kl", "learning_rate")
        }
        for _ in range(UPDATES):
            drawn = from_the_definition(model, rollouts.sequences, rollouts.prompt_lengths, TEMPERATURE, suppressed)
            old_A = drawn.log_probs_A.detach() if old_A is None else old_A
            ratio_A = (drawn.log_probs_A - old_A).exp()
            free_A = ratio_A * advantages_A
            near_A = ratio_A.clamp(1 - CLIP, 1 + CLIP) * advantages_A
            loss = -torch.minimum(free_A, near_A).mean()
            (loss - coefficient * drawn.entropies_A.mean()).backward()
            measured["loss"].append(loss.item())
            measured["clip_fraction"].append((near_A < free_A).double().mean().item())
            measured["entropy"].append(drawn.entropies_A.mean().item())
            measured["approx_kl"].append((ratio_A - 1 - ratio_A.log()).mean().item())
            measured["learning_rate"].append(optimizer.schedule.get_last_lr()[0])
            measured["grad_norm"].append(optimizer.step())
        of_coefficients.append(measured)
    return of_coefficients


def agree(metrics: list[dict], expected: dict[str, list[float]]) -> None:
    found = {name: [step[name] for step in metrics] for name in expected}
    np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-4)
    np.testing.assert_allclose(found["grad_norm"], expected["grad_norm"], rtol=1e-3)
    np.testing.assert_allclose(found["clip_fraction"], expected["clip_fraction"], rtol=1e-12)
    np.testing.assert_allclose(found["entropy"], expected["entropy"], rtol=1e-5)
    np.testing.assert_allclose(found["approx_kl"], expected["approx_kl"], rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(found["learning_rate"], expected["learning_rate"], rtol=1e-9)
    assert [step["step"] for step in metrics] == list(range(1, UPDATES + 1))


# --- updates ---


@pytest.mark.parametrize(("stage", "world_size"), STAGES_ON_RANKS)
def test_updates_are_those_of_a_plain_loop(ranks, tiny_model, reference, world_size, stage):
    of_ranks = ranks(world_size).run(train, tiny_model, stage)
    plain = plain_policy(tiny_model)
    for (metrics, before, after), expected in zip(of_ranks[0], reference, strict=True):
        agree(metrics, expected)
        assert metrics[0]["approx_kl"] == pytest.approx(0.0, abs=1e-6)
        assert metrics[0]["clip_fraction"] == 0.0
        assert metrics[0]["tokens"] == sum(len(ids) for ids in make_rollouts(0).sequences)
        # The reference remains the initial model while the policy trains.
        rollouts = make_rollouts(0)
        for old, row, new in zip(before, rollouts.targets, after, strict=True):
            assert old.shape == row.shape
            assert old.dtype == np.float32
            np.testing.assert_array_equal(old, new)
        np.testing.assert_allclose(
            np.concatenate(before), action_log_probs(plain, tiny_model, rollouts), rtol=0, atol=1e-5
        )
    for other in of_ranks[1:]:
        for (metrics, _, after), (own_metrics, _, own_after) in zip(other, of_ranks[0], strict=True):
            assert metrics == own_metrics
            np.testing.assert_array_equal(np.concatenate(after), np.concatenate(own_after))


def test_the_plain_loop_clips_some_actions_and_moves(reference):
    for measured in reference:
        assert measured["clip_fraction"][0] == 0.0
        assert 0.1 < measured["clip_fraction"][-1] < 0.9
        assert measured["approx_kl"][-1] > 0.01
        assert measured["loss"][-1] < measured["loss"][0] - 0.05


@pytest.mark.parametrize(
    ("stage", "prefix_tree", "changes"),
    [
        pytest.param(0, False, {}, marks=pytest.mark.slow),
        (3, False, {}),
        (2, True, {"token_budget": 10_000}),
        pytest.param(0, True, {"token_budget": "auto"}, marks=pytest.mark.slow),
        (3, True, {"token_budget": "auto"}),
        (2, True, {"gradient_checkpointing": True}),
    ],
)
def test_neither_batches_nor_checkpointing_change_an_update(ranks, tiny_model, reference, stage, prefix_tree, changes):
    for of_rank in ranks(2).run(train, tiny_model, stage, prefix_tree, changes):
        for (metrics, _, _), expected in zip(of_rank, reference, strict=True):
            agree(metrics, expected)


def update_once(source: str, stage: int, rollouts: Rollouts, changes: dict) -> dict:
    return update(make(source, stage, **changes), rollouts)


@pytest.mark.parametrize("stage", STAGES)
def test_ranks_without_work_wait_for_the_others(ranks, tiny_model, stage):
    """With one rollout for two ranks, one of them computes only a dummy."""
    alone = make_rollouts(0).part(7)
    (expected,) = ranks(1).run(update_once, tiny_model, 0, alone, {})
    for metrics in ranks(2).run(update_once, tiny_model, stage, alone, {}):
        for name in ("loss", "grad_norm", "clip_fraction", "entropy", "approx_kl"):
            assert metrics[name] == pytest.approx(expected[name], rel=1e-4), name


def test_what_rollouts_share_is_computed_once_and_last_tokens_are_not_computed(ranks, tiny_model):
    rollouts = make_rollouts(0)
    (metrics,) = ranks(1).run(update_once, tiny_model, 0, rollouts, {"token_budget": 10_000})
    distinct = set()
    for ids, prompt_length in zip(rollouts.sequences, rollouts.prompt_lengths, strict=True):
        if len(ids) > prompt_length:
            distinct |= {tuple(ids[:length]) for length in range(1, len(ids))}
    assert metrics["computed_tokens"] == len(distinct) < metrics["tokens"]


def entropies(source: str, stage: int, coefficient: float) -> list[float]:
    """Returns the entropies of each update when all advantages are equal."""
    engine = make(source, stage, learning_rate=3e-3, weight_decay=0.0)
    rollouts = drawn_rollouts(engine)
    rollouts = replace(rollouts, targets=[np.zeros_like(row) for row in rollouts.targets])
    return [update(engine, rollouts, coefficient)["entropy"] for _ in range(2 * UPDATES)]


@pytest.mark.parametrize("stage", slow_except([2], [0, 2, 3]))
def test_a_reward_for_entropy_raises_it_and_nothing_else_does(ranks, tiny_model, stage):
    for raised in ranks(2).run(entropies, tiny_model, stage, 1.0):
        assert raised[-1] > raised[0] + 0.05
        assert sorted(raised) == raised
    for lowered in ranks(2).run(entropies, tiny_model, stage, -1.0):
        assert lowered[-1] < lowered[0] - 0.05
    for kept in ranks(2).run(entropies, tiny_model, stage, 0.0):
        np.testing.assert_allclose(kept, kept[0], rtol=1e-6)


# --- the reference ---


def reference_of_few(source: str, stage: int) -> list[list[np.ndarray]]:
    engine, rollouts = make(source, stage), make_rollouts(0)
    return [
        engine.reference_log_probs([], []),
        reference_of(engine, rollouts.part(0, 4)),  # empty responses
        reference_of(engine, rollouts.part(0, 5)),  # one of a single token
        reference_of(engine, rollouts.part(5)),
    ]


@pytest.mark.parametrize("stage", [0, 3])
def test_few_or_no_rollouts_have_a_reference_too(ranks, tiny_model, stage):
    for none, empty, half_empty, single in ranks(2).run(reference_of_few, tiny_model, stage):
        assert none == []
        assert [row.shape for row in empty] == [(0,), (0,)]
        assert [row.shape for row in half_empty] == [(0,), (1,)]
        np.testing.assert_array_equal(half_empty[1], single[0])


# --- rejected inputs ---


def refuse(source: str, stage: int) -> list[dict]:
    """Returns the metrics of an update after rejected bad inputs, and without any bad input."""
    good = make_rollouts(0)
    not_a_number = [row.copy() for row in good.targets]
    not_a_number[6][-1] = math.inf
    short = [row[:-1] if index == 7 else row for index, row in enumerate(good.old)]
    bad = [
        (replace(good, prompt_lengths=[*good.prompt_lengths[:-1], 99]), CLIP, "rollout 11: a prompt of 99 tokens"),
        (replace(good, old=short), CLIP, "rollout 7: old_log_probs has the shape"),
        (replace(good, targets=not_a_number), CLIP, "rollout 6: advantages is inf at action"),
        (replace(good, targets=good.targets[:-1]), CLIP, "12 rollouts, but advantages has 11 entries"),
        (good.part(0), CLIP, "no rollout has a response token"),
        (good.part(), CLIP, "no rollout has a response token"),
        (good, 0.0, "must lie between 0 and 1"),
        (good, 1.0, "must lie between 0 and 1"),
    ]
    engine, undisturbed = make(source, stage), make(source, stage)
    for rollouts, clip, message in bad:
        with pytest.raises(ValueError, match=message):
            update(engine, rollouts, clip=clip)
        assert engine.step == 0
    with pytest.raises(ValueError, match="rollout 1: a prompt of 0 tokens"):
        engine.reference_log_probs([[1, 2], [3]], [1, 0])
    return [update(engine, good), update(undisturbed, good)]


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_bad_is_refused_and_leaves_the_engine_as_it_was(ranks, tiny_model, stage):
    for after, undisturbed in ranks(2).run(refuse, tiny_model, stage):
        assert after == undisturbed


# --- weights on disk and in memory ---


def train_and_save(source: str, stage: int, directory: str) -> dict[str, torch.Tensor]:
    engine = make(source, stage)
    rollouts = drawn_rollouts(engine)
    for _ in range(3):
        update(engine, rollouts)
    engine.save(directory)
    return engine.weights()


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("fixture", ["tiny_model", "tied_model"])
def test_weights_are_those_that_save_wrote_and_plain_transformers_loads(ranks, request, tmp_path, fixture, stage):
    source = request.getfixturevalue(fixture)
    directory = tmp_path / "policy"
    weights, of_others = ranks(2).run(train_and_save, source, stage, str(directory))
    assert of_others == {}
    written = load_file(directory / "model.safetensors")
    assert weights.keys() == written.keys()
    for name, tensor in written.items():
        assert torch.equal(weights[name], tensor), name
        assert weights[name].device.type == "cpu"
    plain, report = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state = plain.state_dict()
    before = plain_policy(source).state_dict()
    for name, tensor in weights.items():
        assert torch.equal(state[name], tensor), name
        assert not torch.equal(before[name], tensor[: len(before[name])]), f"{name} was not trained"
    tokenizer = load_tokenizer(str(directory))
    rows = len(plain.get_output_embeddings().weight)
    assert rows == plain.config.vocab_size
    assert rows >= len(tokenizer)
    assert rows % 8 == 0
    assert plain.config.pad_token_id == tokenizer.pad_token_id
    assert plain.config.architectures == ["LlamaForCausalLM"]
    assert (directory / RESUME_FOLDER).is_dir()


def save_families(sources: dict[str, str], out: str) -> dict[str, np.ndarray]:
    """Saves a policy of each family after an update; returns log-probs computed from the saved policy."""
    log_probs = {}
    for name, source in sources.items():
        engine = make(source, 0, warmup_fraction=0.0)  # with warm-up the first step would have the rate 0
        update(engine, drawn_rollouts(engine))
        directory = str(Path(out) / name)
        engine.save(directory)
        log_probs[name] = np.concatenate(reference_of(make(directory, 0), make_rollouts(0)))
    return log_probs


def test_saved_policies_of_every_family_load_in_plain_transformers(ranks, tmp_path):
    sources = {name: save_base_model(name, tmp_path / "base" / name) for name in NAMES}
    (log_probs,) = ranks(1).run(save_families, sources, str(tmp_path / "saved"))
    for name, found in log_probs.items():
        directory = tmp_path / "saved" / name
        plain, report = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
        assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys")), name
        expected = action_log_probs(plain.eval(), str(directory), make_rollouts(0))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5, err_msg=name)
        unlike = action_log_probs(plain_policy(sources[name]), sources[name], make_rollouts(0))
        assert np.abs(found - unlike).max() > 1e-3, f"{name} was not trained"


# --- resuming ---


def go_straight(source: str, stage: int) -> tuple[list[dict], dict[str, torch.Tensor], np.ndarray]:
    engine = make(source, stage)
    rollouts = drawn_rollouts(engine)
    metrics = [update(engine, rollouts) for _ in range(4)]
    return metrics[3:], engine.weights(), np.concatenate(reference_of(engine, rollouts))


def resume(source: str, stage: int, directory: str) -> tuple[list[dict], dict[str, torch.Tensor], np.ndarray]:
    engine = make(source, stage)
    rollouts = drawn_rollouts(engine)
    engine.load(directory)
    assert engine.step == 3
    metrics = [update(engine, rollouts)]
    return metrics, engine.weights(), np.concatenate(reference_of(engine, rollouts))


@pytest.mark.parametrize("stage", STAGES)
def test_a_loaded_policy_goes_on_as_if_it_had_never_stopped(ranks, tiny_model, tmp_path, stage):
    straight = ranks(2).run(go_straight, tiny_model, stage)
    ranks(2).run(train_and_save, tiny_model, stage, str(tmp_path / "saved"))
    resumed = ranks(2).run(resume, tiny_model, stage, str(tmp_path / "saved"))
    for (metrics, weights, log_probs), (expected_metrics, expected_weights, expected_log_probs) in zip(
        resumed, straight, strict=True
    ):
        for step, expected in zip(metrics, expected_metrics, strict=True):
            for name, number in expected.items():
                assert step[name] == pytest.approx(number, rel=1e-6, abs=1e-6), name
        assert weights.keys() == expected_weights.keys()
        for name, tensor in expected_weights.items():
            torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-6, msg=name)
        np.testing.assert_array_equal(log_probs, expected_log_probs)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 3])
def test_a_policy_goes_on_with_another_number_of_shards(ranks, tiny_model, tmp_path, stage):
    expected_metrics, expected_weights, expected_log_probs = ranks(2).run(go_straight, tiny_model, stage)[0]
    ranks(2).run(train_and_save, tiny_model, stage, str(tmp_path / "saved"))
    ((metrics, weights, log_probs),) = ranks(1).run(resume, tiny_model, stage, str(tmp_path / "saved"))
    assert expected_metrics[0].pop("micro_batches") <= metrics[0].pop("micro_batches")  # the number on each rank
    for name, number in expected_metrics[0].items():
        assert metrics[0][name] == pytest.approx(number, rel=1e-4, abs=1e-5), name
    for name, tensor in expected_weights.items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-5, msg=name)
    np.testing.assert_allclose(log_probs, expected_log_probs, rtol=0, atol=1e-5)


def load_wrongly(source: str, stage: int, directory: str) -> str:
    with pytest.raises(CheckpointError) as refused:
        make(source, stage).load(directory)
    return str(refused.value)


def test_a_state_of_another_stage_is_refused(ranks, tiny_model, tmp_path):
    saved = str(tmp_path / "saved")
    ranks(2).run(train_and_save, tiny_model, 2, saved)
    assert "saved with zero_stage=2, now 3" in ranks(2).run(load_wrongly, tiny_model, 3, saved)[0]
    assert "no state to resume from" in ranks(1).run(load_wrongly, tiny_model, 2, str(tmp_path))[0]
