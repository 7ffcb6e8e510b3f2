"""Freezing, offloading and Muon work at their ZeRO stages, and change nothing else."""

import json

import numpy as np
import pytest
import torch

from rlhf_critic.algorithms import head_posterior
from rlhf_critic.checkpoint.critic_directory import load_critic
from rlhf_critic.config.model import ModelConfig
from rlhf_critic.config.train import TrainConfig
from rlhf_critic.data.encoding import Encoder, load_tokenizer
from rlhf_critic.data.preferences import load_preferences
from rlhf_critic.errors import CheckpointError, ConfigError
from rlhf_critic.model.factory import check_critic_model, create_critic_model
from rlhf_critic.training.critic_engine import CriticEngine
from rlhf_critic.training.posterior_fit import fit_head_posterior, last_states_of, sample_units
from tests.helpers import make_preferences
from tests.rlhf_critic.training.critic_runs import OPTIONS, STEPS, card_of, make, rows_of, train, whole_weights

ONE_CANDIDATE = torch.tensor([0.01], dtype=torch.float64)
FROZEN = ("model.embed_tokens.weight", "model.layers.0.")


def train_frozen(source: str, data: str, cache: str, stage: int, freeze_layers: int) -> tuple[list[float], list, list]:
    encoder = Encoder(load_tokenizer(source), max_length=64)
    options = OPTIONS.model_copy(update={"zero_stage": stage})
    model = ModelConfig(path=source, freeze_layers=freeze_layers)
    engine = CriticEngine.from_pretrained(encoder, model, options, STEPS)
    before = whole_weights(engine)
    metrics = train(engine, load_preferences(data, encoder, cache), 4)
    after = whole_weights(engine)
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    return [step["loss"] for step in metrics], sorted(before), sorted(moved)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


def test_frozen_layers_stay_as_they_are(ranks, tiny_model, preference_file, cache):
    losses = []
    for stage in (0, 1, 2, 3):
        of_stage, names, moved = ranks(2).run(train_frozen, tiny_model, preference_file, cache, stage, 1)[0]
        assert moved == [name for name in names if not name.startswith(FROZEN)]
        losses.append(of_stage)
    for of_stage in losses[1:]:
        np.testing.assert_allclose(of_stage, losses[0], rtol=1e-4)


def freeze_too_many(source: str) -> None:
    encoder = Encoder(load_tokenizer(source), max_length=64)
    with pytest.raises(CheckpointError, match=r"model.freeze_layers is 3, but the model has 2 layers"):
        CriticEngine.from_pretrained(encoder, ModelConfig(path=source, freeze_layers=3), OPTIONS, STEPS)


def test_more_layers_than_there_are_cannot_be_frozen(ranks, tiny_model):
    ranks(1).run(freeze_too_many, tiny_model)


def losses_of(source: str, data: str, cache: str, stage: int, changes: dict) -> list[float]:
    engine, preferences, _ = make(source, data, cache, stage, **changes)
    return [step["loss"] for step in train(engine, preferences, 4)]


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        (1, {"offload_optimizer": True}),
        (2, {"offload_optimizer": True}),
        (3, {"offload_optimizer": True, "offload_parameters": True}),
    ],
)
def test_offloading_changes_no_loss(ranks, tiny_model, preference_file, cache, stage, changes):
    offloaded, kept = (
        ranks(2).run(losses_of, tiny_model, preference_file, cache, stage, options)[0] for options in (changes, {})
    )
    np.testing.assert_allclose(offloaded, kept, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"zero_stage": 0, "offload_optimizer": True}, "needs zero_stage 1, 2 or 3"),
        ({"zero_stage": 2, "offload_parameters": True}, "needs zero_stage 3"),
        ({"early_stopping_patience": 2}, "counts validations; set train.validate_every above 0"),
        ({"loss": "per_token", "margin_scale": 1.0}, "for train.loss sequence only"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)


def test_a_base_model_is_checked_and_counted_without_its_weights(tiny_model, tied_model):
    for source in (tiny_model, tied_model):
        tokenizer = load_tokenizer(source)
        checked = check_critic_model(source, tokenizer)
        built = create_critic_model(source, tokenizer, None).model
        assert {p.device.type for p in checked.parameters()} == {"meta"}
        assert [(name, p.shape) for name, p in checked.named_parameters()] == [
            (name, p.shape) for name, p in built.named_parameters()
        ]
        assert len(list(check_critic_model(source, tokenizer, num_layers=1).parameters())) < len(
            list(built.parameters())
        )


def posterior_of_ranks(
    source: str, data: str, held_out: str, cache: str, stage: int, directory: str, steps: int
) -> dict:
    """Fits a posterior after some steps; saves the critic, and returns what was fitted and what it costs."""
    engine, preferences, encoder = make(source, data, cache, stage)
    train(engine, preferences, steps)
    head_posterior.CANDIDATES = ONE_CANDIDATE
    posterior, report = engine.fit_posterior(preferences, load_preferences(held_out, encoder, cache))
    engine.save(directory, encoder, card_of(encoder))
    states = torch.randn(6, len(posterior.mean_D), generator=torch.Generator().manual_seed(0))
    return {"stds": posterior.stds(states).tolist(), "report": report.to_dict()}


@pytest.mark.parametrize(("steps", "sampled"), [(4, 3), (1, 1)])  # with one preference, a rank has none
def test_ranks_fit_the_posterior_of_one_process(
    ranks, tiny_model, preference_file, cache, tmp_path, monkeypatch, steps, sampled
):
    """With one candidate of lambda: of several that are about as likely, rounding would choose."""
    monkeypatch.setattr(head_posterior, "CANDIDATES", ONE_CANDIDATE)
    # Labels with errors, so that one temperature is clearly the most likely one.
    rows = make_preferences(40, seed=5)
    for row in rows[::4]:
        row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    validation = tmp_path / "validation.jsonl"
    validation.write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = (preference_file, str(validation), cache)
    results = ranks(2).run(posterior_of_ranks, tiny_model, *files, 3, str(tmp_path / "critic"), steps)
    report = results[0]["report"]
    assert report == pytest.approx(results[1]["report"])
    loaded = load_critic(tmp_path / "critic")
    preferences = load_preferences(preference_file, loaded.encoder, cache)
    units = sample_units(preferences, report["preferences"], OPTIONS.seed)
    assert len(units) == sampled  # a small part of the steps with twelve preferences each
    held_out = sample_units(
        load_preferences(str(validation), loaded.encoder, cache), report["validation"], OPTIONS.seed
    )
    posterior, alone = fit_head_posterior(
        units, held_out, last_states_of(loaded.critic, 150), scale=len(preferences) / len(units)
    )
    assert alone.to_dict() == pytest.approx(report, rel=1e-3)
    states = torch.randn(6, len(posterior.mean_D), generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(results[0]["stds"], posterior.stds(states).tolist(), rtol=2e-2)


def fit_without_memory(source: str, data: str, cache: str) -> None:
    engine, preferences, _ = make(source, data, cache, 2)
    assert engine.training.free_memory() > 1e6
    engine.training.free_memory = lambda: 10_000
    with pytest.raises(ConfigError, match=r"calibrating needs 0.0 GB .* rlhf-critic calibrate on the checkpoint"):
        engine.fit_posterior(preferences, preferences)


def test_ranks_without_memory_for_a_posterior_say_so_before_they_compute(ranks, tiny_model, preference_file, cache):
    ranks(2).run(fit_without_memory, tiny_model, preference_file, cache)


MUON = {"optimizer": "muon", "weight_decay": 0.0}


def train_with_muon(source: str, data: str, cache: str, directory: str) -> tuple[list[float], list[float]]:
    """Returns the losses of six steps, and of three more after a stop at the third."""
    engine, preferences, encoder = make(source, data, cache, 0, **MUON)
    losses = [step["loss"] for step in train(engine, preferences, 3)]
    engine.save(directory, encoder, card_of(encoder))
    losses += [step["loss"] for step in train(engine, preferences, 6)]
    again, preferences, _ = make(source, data, cache, 0, **MUON)
    again.load(directory)
    return losses, [step["loss"] for step in train(again, preferences, 6)]


def test_muon_on_two_ranks_takes_the_steps_of_a_plain_loop_and_resumes(
    ranks, tiny_model, preference_file, cache, tmp_path
):
    losses, resumed = ranks(2).run(train_with_muon, tiny_model, preference_file, cache, str(tmp_path / "saved"))[0]
    np.testing.assert_allclose(resumed, losses[3:], rtol=1e-6)

    encoder = Encoder(load_tokenizer(tiny_model), max_length=64)
    preferences = load_preferences(preference_file, encoder, cache)
    torch.manual_seed(OPTIONS.seed)
    critic = create_critic_model(tiny_model, encoder.tokenizer, None, disable_dropout=True)
    hidden = [one for name, one in critic.named_parameters() if ".layers." in name and one.dim() == 2]
    others = [one for one in critic.parameters() if all(one is not matrix for matrix in hidden)]
    optimizers = [
        torch.optim.Muon(hidden, weight_decay=0.0, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    expected = []
    for step in range(6):
        pairs = [preferences[row].responses for row in rows_of(preferences, step)]
        ends_P2 = torch.stack(
            [torch.cat([critic.model(input_ids=torch.tensor(ids)[None]).logits[0] for ids in pair]) for pair in pairs]
        )
        loss = torch.nn.functional.softplus(ends_P2[:, 1] - ends_P2[:, 0]).mean()
        loss.backward()
        expected.append(loss.item())
        torch.nn.utils.clip_grad_norm_(critic.parameters(), OPTIONS.max_grad_norm)
        for optimizer in optimizers:
            # The cosine schedule with a warm-up of four steps.
            warm = 0.5 * (1 + np.cos(np.pi * (step - 4) / (STEPS - 4)))
            optimizer.param_groups[0]["lr"] = OPTIONS.learning_rate * (step / 4 if step < 4 else warm)
            optimizer.step()
            optimizer.zero_grad()
    np.testing.assert_allclose(losses, expected, rtol=1e-3)  # torch orthogonalises in bf16
