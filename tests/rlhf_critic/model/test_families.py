"""A model of any family is built, trained, scored, saved and loaded, with the results of plain transformers.

`train_family` is sent to real ranks (Ray actors) and runs there, once for each family and ZeRO stage.
"""

import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from rlhf_critic.algorithms.preference_losses import bradley_terry_loss
from rlhf_critic.batching.padded import PaddedBatch
from rlhf_critic.checkpoint.critic_directory import CriticCard, EncoderCard, load_critic, save_critic
from rlhf_critic.config.model import ModelConfig
from rlhf_critic.config.train import TrainConfig
from rlhf_critic.data.encoding import Encoder, load_tokenizer
from rlhf_critic.data.preferences import EncodedPreferences, load_preferences
from rlhf_critic.errors import CheckpointError
from rlhf_critic.model.backbone import PADDED_FAMILIES
from rlhf_critic.model.factory import create_critic_model, validate_positions
from rlhf_critic.model.hf_config import silence_dropout
from rlhf_critic.model.prefix_attention import PREFIX_TREE_FAMILIES
from rlhf_critic.scoring.local import score_sequences
from rlhf_critic.training.critic_engine import CriticEngine
from tests.helpers import slow_except, write_preferences
from tests.rlhf_critic.families import BOS, NAMES, UNTESTED_NAMES, save_base_model

STEPS, ROWS = 3, 6
MAX_LENGTH = 64
STAGES = (0, 3)
OPTIONS = TrainConfig(
    learning_rate=1e-3,
    schedule="constant",
    warmup_fraction=0.0,
    adam_epsilon=1e-4,  # a gradient that is only rounding noise must not become a full step
    token_budget=200,
)
# In `make test`: rotary embeddings, soft caps, learned positions with a leading BOS, padded batches, experts.
TRAINED = slow_except(["llama", "gemma2", "mixtral"], [*NAMES, *UNTESTED_NAMES])


def load_data(source: str, data: str, cache: str) -> tuple[Encoder, EncodedPreferences]:
    encoder = Encoder(load_tokenizer(source), MAX_LENGTH)
    return encoder, load_preferences(data, encoder, cache)


def rows_of(step: int) -> np.ndarray:
    return np.arange(step * ROWS, (step + 1) * ROWS)


def probes_of(preferences: EncodedPreferences) -> list[list[int]]:
    """Returns sequences to score, of many lengths; some share their prompt, some share nothing."""
    return [ids.tolist() for pair in preferences.take(range(4)) for ids in (pair.responses[0], pair.responses[-1])]


def padded_pairs(preferences: EncodedPreferences, pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns two preferences in DeepSpeed-Chat's format: chosen rows, then rejected rows, and their mask."""
    pairs = preferences.take(range(2))
    padded = PaddedBatch.from_sequences(
        [pair.responses[0] for pair in pairs] + [pair.responses[-1] for pair in pairs], pad_token_id
    )
    return padded.input_ids_SL, padded.attention_mask_SL


def steps_as_ported_code_takes_them(engine: CriticEngine, preferences: EncodedPreferences) -> list[float]:
    """Takes steps with DeepSpeed-Chat's calls, on preferences and on values; returns the losses."""
    module = engine._engine
    ids, mask = padded_pairs(preferences, engine.critic.pad_token_id)
    losses = []
    for _ in range(2):
        for loss in (
            lambda: module(input_ids=ids, attention_mask=mask, use_cache=False)["loss"],
            lambda: module.forward_value(ids, mask, return_value_only=True)[:, :-1].square().mean(),
        ):
            computed = loss()
            module.backward(computed)
            module.step()
            losses.append(computed.item())
    return losses


def train_family(name: str, source: str, data: str, cache: str, stage: int, out: str) -> tuple:
    """Returns losses, gradient norms, rewards after training, and losses of ported code.

    The critic is saved before the steps of the ported code.
    """
    encoder, preferences = load_data(source, data, cache)
    options = OPTIONS.model_copy(update={"zero_stage": stage})
    engine = CriticEngine.from_pretrained(encoder, ModelConfig(path=source), options, STEPS)
    metrics = [engine.train_step(preferences, rows_of(step)) for step in range(STEPS)]
    rewards = engine.rewards(probes_of(preferences))
    card = CriticCard(
        version=name,
        encoder=EncoderCard(fingerprint=encoder.fingerprint, max_length=MAX_LENGTH),
        num_padding_at_beginning=int(name == "opt"),
    )
    save_critic(out, engine.critic, encoder, card, is_main=engine.rank == 0)
    engine._engine.train()
    ported = steps_as_ported_code_takes_them(engine, preferences)
    return [m.loss for m in metrics], [m.grad_norm for m in metrics], rewards, ported


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("families")


@pytest.fixture(scope="module")
def sources(workspace) -> dict[str, str]:
    return {name: save_base_model(name, workspace / "base" / name) for name in [*NAMES, *UNTESTED_NAMES]}


@pytest.fixture(scope="module")
def data(workspace) -> str:
    return write_preferences(workspace / "train.jsonl", STEPS * ROWS)


@pytest.fixture(scope="module")
def trained(ranks, workspace, sources, data) -> Callable[[str, int], tuple]:
    """Results of training a family on two ranks at a ZeRO stage. The critic is in ``workspace/stage-N/FAMILY``."""

    @cache
    def train(name: str, stage: int) -> tuple:
        out = str(workspace / f"stage-{stage}" / name)
        return ranks(2).run(train_family, name, sources[name], data, str(workspace / "cache"), stage, out)[0]

    return train


def plain_model(source: str, head_1D: torch.Tensor) -> PreTrainedModel:
    """Loads the base model with plain transformers, with a given head and without dropout."""
    config = AutoModelForCausalLM.from_pretrained(source).config
    silence_dropout(config)
    config.num_labels = 1
    model = AutoModelForSequenceClassification.from_pretrained(source, config=config)
    model.score.weight.data.copy_(head_1D)
    return model


def reward_of(model: PreTrainedModel, ids: np.ndarray) -> torch.Tensor:
    """Computes the reward by definition: plain transformers on the bare sequence, last hidden state times head."""
    backbone = getattr(model, model.base_model_prefix)
    return backbone(input_ids=torch.tensor(ids)[None]).last_hidden_state[0, -1:] @ model.score.weight[0]


@pytest.mark.parametrize("name", TRAINED)
def test_losses_are_those_of_a_plain_loop(trained, sources, data, workspace, name):
    """Trains a plain loop, one preference at a time, without engine, batches or project code except the loss."""
    encoder, preferences = load_data(sources[name], data, str(workspace / "cache"))
    torch.manual_seed(OPTIONS.seed)
    head_1D = create_critic_model(sources[name], encoder.tokenizer, None).model.score.weight.detach()
    model = plain_model(sources[name], head_1D)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=OPTIONS.learning_rate, betas=(0.9, 0.95), eps=OPTIONS.adam_epsilon, weight_decay=0.0
    )
    losses, norms = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        total = 0.0
        for pair in preferences.take(rows_of(step)):
            loss = bradley_terry_loss(reward_of(model, pair.responses[0]), reward_of(model, pair.responses[-1])).sum()
            (loss / ROWS).backward()
            total += loss.item() / ROWS
        losses.append(total)
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIONS.max_grad_norm).item())
        optimizer.step()
    for stage in STAGES:
        stage_losses, stage_norms, *_ = trained(name, stage)
        np.testing.assert_allclose(stage_losses, losses, rtol=1e-4, err_msg=f"stage {stage}")
        np.testing.assert_allclose(stage_norms, norms, rtol=1e-3, err_msg=f"stage {stage}")


@torch.no_grad()
@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("stage", STAGES)
def test_a_saved_critic_scores_the_same_here_and_in_plain_transformers(trained, sources, data, workspace, name, stage):
    _, preferences = load_data(sources[name], data, str(workspace / "cache"))
    probes = probes_of(preferences)
    _, _, expected, _ = trained(name, stage)
    assert np.ptp(expected) > 0.1  # not all the same
    assert any(probe[0] == BOS for probe in probes) == (name == "opt")  # long ones are truncated from the left
    directory = workspace / f"stage-{stage}" / name
    loaded = load_critic(directory)
    assert loaded.critic.prefix_tree == (name in PREFIX_TREE_FAMILIES)
    assert loaded.critic.num_padding_at_beginning == (name == "opt")
    np.testing.assert_allclose(score_sequences(loaded.critic, probes, 200), expected, rtol=0, atol=1e-5)
    plain, report = AutoModelForSequenceClassification.from_pretrained(directory, output_loading_info=True)
    assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert "rlhf_critic" not in type(plain).__module__
    padded = PaddedBatch.from_sequences(probes, loaded.critic.pad_token_id)
    batch = plain.eval()(input_ids=padded.input_ids_SL, attention_mask=padded.attention_mask_SL).logits[:, 0]
    np.testing.assert_allclose(batch, expected, rtol=0, atol=1e-5)
    alone = [plain(torch.tensor([probe])).logits.item() for probe in probes]
    np.testing.assert_allclose(alone, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", TRAINED)
def test_ported_code_trains_it_alike_at_every_stage(trained, sources, data, workspace, name):
    _, preferences = load_data(sources[name], data, str(workspace / "cache"))
    of_stages = np.array([trained(name, stage)[3] for stage in STAGES])
    np.testing.assert_allclose(of_stages[1:], of_stages[:1], rtol=1e-4)
    pair_losses, value_losses = of_stages[0, ::2], of_stages[0, 1::2]
    for losses in (pair_losses, value_losses):  # the steps were taken
        assert abs(losses[1] / losses[0] - 1) > 1e-4
    critic = load_critic(workspace / "stage-0" / name).critic
    with torch.no_grad():
        first = critic(*padded_pairs(preferences, critic.pad_token_id))["loss"]
    assert first.item() == pytest.approx(pair_losses[0], rel=1e-4)


@pytest.mark.parametrize("name", [*NAMES, *UNTESTED_NAMES])
def test_a_critic_has_the_base_models_weights_a_padded_vocabulary_and_a_new_head(sources, name):
    tokenizer = load_tokenizer(sources[name])
    model = create_critic_model(sources[name], tokenizer, None).model
    before = AutoModelForCausalLM.from_pretrained(sources[name])
    rows, old_rows = model.get_input_embeddings().weight, before.get_input_embeddings().weight
    assert len(rows) % 8 == 0
    assert len(tokenizer) <= len(rows) < len(tokenizer) + 8
    assert torch.equal(rows[: len(old_rows)], old_rows)
    body = dict(before.base_model.named_parameters())
    for parameter_name, parameter in model.base_model.named_parameters():
        assert parameter is rows or torch.equal(parameter, body[parameter_name]), parameter_name
    assert model.score.weight.any()


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_an_untrained_critic_is_saved_with_its_scores(sources, name, tmp_path):
    """What training cannot change, for families that `make test` does not train: layout of files, encoding, scores."""
    encoder = Encoder(load_tokenizer(sources[name]), MAX_LENGTH)
    critic = create_critic_model(sources[name], encoder.tokenizer, None, disable_dropout=True).eval()
    assert critic.prefix_tree == (name in PREFIX_TREE_FAMILIES)
    probes = [[5, 6, 7, 8, 9, 10, 11, 12], [5, 6, 7, 20], [5], [30, 31, 32]]
    expected = score_sequences(critic, probes, 200)
    assert np.ptp(expected) > 0.1
    save_critic(tmp_path, critic, encoder, CriticCard(version=name, encoder=EncoderCard.of(encoder)))
    np.testing.assert_array_equal(score_sequences(load_critic(tmp_path).critic, probes, 200), expected)
    plain, report = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    alone = [plain.eval()(torch.tensor([probe])).logits.item() for probe in probes]
    np.testing.assert_allclose(alone, expected, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_training_mode_changes_no_reward(sources, name):
    """Without dropout no layer is random: some routers add noise or sample experts in training."""
    critic = create_critic_model(sources[name], load_tokenizer(sources[name]), None, disable_dropout=True)
    assert critic.training
    batch = critic.batch_of([[5, 6, 7, 8, 9, 10, 11, 12], [5, 6, 7, 20], [5], [30, 31, 32]])
    in_training = critic.rewards(batch)
    torch.testing.assert_close(in_training, critic.eval().rewards(batch), rtol=0, atol=0)


@pytest.mark.parametrize("name", UNTESTED_NAMES)
@pytest.mark.parametrize("prefix_tree", [True, False])
def test_a_family_that_is_not_tested_works_and_says_so_once(sources, name, prefix_tree, caplog):
    with caplog.at_level(logging.WARNING, logger="rlhf_critic"):
        critic = create_critic_model(
            sources[name], load_tokenizer(sources[name]), None, disable_dropout=True, prefix_tree=prefix_tree
        ).eval()
        score_sequences(critic, [[5, 6, 7], [5, 6]], 100)
    (record,) = caplog.records
    assert f"untested model family {name} (tested: " in record.message
    assert "Compare some scores" in record.message


@pytest.mark.parametrize("name", sorted({*PREFIX_TREE_FAMILIES, *PADDED_FAMILIES}))
def test_a_limit_beyond_learned_positions_is_refused(name, tmp_path):
    """A sequence longer than the learned positions would fail GPT-2 or OPT in the middle of a run."""
    critic = create_critic_model(save_base_model(name, tmp_path), load_tokenizer(str(tmp_path)), None)
    positions = getattr(critic.model.config, "max_position_embeddings", 256)
    validate_positions(critic.model, positions)
    if name in {"gpt2", "opt"}:
        critic.rewards(critic.batch_of([[5] * positions]))
        with pytest.raises(CheckpointError, match=f"has learned {positions} positions"):
            validate_positions(critic.model, positions + 1)
    else:
        validate_positions(critic.model, positions + 1)
