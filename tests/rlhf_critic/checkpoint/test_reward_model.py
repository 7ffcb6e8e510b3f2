"""A reward model of another system is scored as plain transformers scores it, under an encoding that is stated."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf_critic.checkpoint.reward_model import check_reward_model, open_reward_model
from rlhf_critic.config.model import AssumedEncoding
from rlhf_critic.config.serve import CallLimits
from rlhf_critic.errors import CheckpointError, ConfigError
from rlhf_critic.scoring.items import Conversation, Text, encode_items
from rlhf_critic.scoring.local import score_sequences
from tests.helpers import save_tiny_tokenizer, tiny_config

BIAS = 0.375
EOS = 1


def save_reward_model(directory: Path, *, bias: float | None = None, num_labels: int = 1, **tokenizer: Any) -> Path:
    """Saves a model as TRL, Skywork and others publish theirs: safetensors, native names, the tokenizer."""
    save_tiny_tokenizer(directory, **tokenizer)
    torch.manual_seed(2)
    config = tiny_config(333, num_labels=num_labels, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(directory)
    if bias is not None:
        change_weights(directory, {"score.bias": torch.tensor([bias])})
    return directory


def change_weights(directory: Path, changes: dict[str, torch.Tensor | None]) -> None:
    path = directory / "model.safetensors"
    tensors = {name: tensor for name, tensor in {**load_file(path), **changes}.items() if tensor is not None}
    save_file(tensors, path, metadata={"format": "pt"})


def change_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def plain_scores(directory: Path, sequences: list[list[int]]) -> list[float]:
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    with torch.no_grad():
        return [model(torch.tensor([ids])).logits.item() for ids in sequences]


def some_ids() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 333, (length,), generator=generator).tolist() for length in (1, 2, 9, 30, 60)]


@pytest.mark.parametrize("bias", [None, BIAS])
def test_the_reward_is_that_of_plain_transformers_and_the_heads_bias(bias, tmp_path):
    source = save_reward_model(tmp_path / "model", bias=bias)
    loaded = open_reward_model(source, "model").load()
    rewards = score_sequences(loaded.critic, some_ids(), 500)
    expected = np.array(plain_scores(source, some_ids())) + (bias or 0.0)
    assert np.ptp(expected) > 0.1, "scores that differ"
    np.testing.assert_allclose(rewards, expected, rtol=0, atol=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"], "nothing is copied"


def test_a_model_that_pads_with_eos_is_read_before_an_eos_at_the_end(tmp_path):
    source = save_reward_model(tmp_path / "model", pad_is_eos=True)
    change_config(source, pad_token_id=EOS)
    opened = open_reward_model(source, "model")
    sequences = [[*some_ids()[2], *[EOS] * count] for count in (0, 1, 2)]
    encoded = [one.ids for one in encode_items(sequences, opened.encoder, CallLimits())]
    rewards = score_sequences(opened.load().critic, encoded, 500)
    np.testing.assert_allclose(rewards, plain_scores(source, sequences), rtol=0, atol=1e-5)
    text = opened.encoder.render("please", "of course").removesuffix("</s>")
    own = AutoTokenizer.from_pretrained(source)(f"{text}</s>", add_special_tokens=False)["input_ids"]
    items = [Text(text), Text(f"{text}</s>"), Conversation("please", "of course")]
    encoded = [one.ids for one in encode_items(items, opened.encoder, CallLimits())]
    rewards = score_sequences(opened.load().critic, encoded, 500)
    np.testing.assert_allclose(rewards, plain_scores(source, [own] * 3), rtol=0, atol=1e-5)


def test_the_encoding_is_the_tokenizers_own_and_is_stated(tmp_path, caplog):
    source = save_reward_model(tmp_path / "model")
    with caplog.at_level(logging.INFO, "rlhf_critic"):
        opened = open_reward_model(source, "owner/model")
    assert "assumed encoding" in caplog.text
    assert opened.card.version == "model@assumed-auto-512", "the positions of the config"
    tokenizer = AutoTokenizer.from_pretrained(source)
    turns = [{"role": "user", "content": "please"}, {"role": "assistant", "content": "of course"}]
    expected = tokenizer(tokenizer.apply_chat_template(turns, tokenize=False), add_special_tokens=False)["input_ids"]
    assert opened.encoder.encode("please", "of course").ids == expected


def test_the_encoding_can_be_chosen_and_is_part_of_the_digest(tmp_path):
    source = save_reward_model(tmp_path / "model")
    assumed = check_reward_model(source, "model")
    chosen = check_reward_model(source, "model", AssumedEncoding(chat_template="plain", max_length=7))
    assert chosen.opened.card.version == "model@assumed-plain-7"
    assert chosen.opened.encoder.render("please ", "go") == "please go</s>"
    assert assumed.digest != chosen.digest
    assert assumed.digest == check_reward_model(source, "model").digest


def test_a_critic_of_this_project_keeps_its_own_encoding(tmp_path):
    source = save_reward_model(tmp_path / "model")
    (source / "critic.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"--max-length is for a reward model without critic.json"):
        open_reward_model(source, "model", AssumedEncoding(max_length=7))


def several_labels(directory: Path) -> Path:
    return save_reward_model(directory, num_labels=5)


def custom_head(directory: Path) -> Path:
    save_reward_model(directory)
    change_weights(directory, {"score.weight": None, "regression_layer.weight": torch.ones(19, 64)})
    change_config(directory, architectures=["LlamaForRewardModelWithGating"])
    return directory


def head_of_two_layers(directory: Path) -> Path:
    save_reward_model(directory)
    change_weights(directory, {"score.weight": None, "score.0.weight": torch.ones(64, 64)})
    return directory


def further_head(directory: Path) -> Path:
    save_reward_model(directory)
    change_weights(directory, {"gating.weight": torch.ones(3, 64)})
    return directory


def other_class(directory: Path) -> Path:
    save_reward_model(directory)
    change_config(directory, architectures=["LlamaForGatedRewards"])
    return directory


def another_format(directory: Path) -> Path:
    save_reward_model(directory)
    weights = load_file(directory / "model.safetensors")
    renamed = {
        ("v_head.weight" if name == "score.weight" else f"rwtransformer.{name.removeprefix('model.')}"): tensor
        for name, tensor in weights.items()
    }
    save_file(renamed, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def damaged_head(directory: Path) -> Path:
    save_reward_model(directory)
    change_weights(directory, {"score.weight": torch.full((1, 32), float("nan"))})
    return directory


REFUSED = {
    several_labels: r"my/model: LlamaForSequenceClassification cannot be scored: .*5 outputs \(labels\), expected 1",
    custom_head: r"LlamaForRewardModelWithGating cannot be scored, because it has no score.weight .*regression_layer",
    head_of_two_layers: r"cannot be scored, because it has no score.weight",
    further_head: r"cannot be scored: .*\n.*unexpected: gating.weight",
    other_class: r"LlamaForGatedRewards cannot be scored, because it is not a \*ForSequenceClassification class",
    another_format: r"format deepspeed-chat.*rlhf-critic export",
    damaged_head: r"the head \(score.weight\) is NaN or infinite",
}


@pytest.mark.parametrize("save", REFUSED)
def test_what_cannot_be_scored_is_refused_by_name_and_reason(save, tmp_path):
    with pytest.raises(CheckpointError, match=REFUSED[save]):
        check_reward_model(save(tmp_path / "model"), "my/model")
