"""A reward model that TRL's own trainer made, converted, has the scores that it had there, on TRL's token ids."""

from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf_critic.checkpoint.convert import convert_checkpoint
from rlhf_critic.checkpoint.critic_directory import load_critic
from rlhf_critic.scoring.local import score_sequences
from tests.helpers import make_preferences

EOS = 1


def conversation(row: dict[str, str], side: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[side]}]


@pytest.mark.parametrize("kind", ["texts", "conversations"])
def test_a_checkpoint_of_trls_trainer_keeps_its_scores(kind, tiny_model, tmp_path):
    from trl import RewardConfig, RewardTrainer

    rows = make_preferences(6)
    if kind == "texts":
        data = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows]
    else:
        data = [{side: conversation(row, side) for side in ("chosen", "rejected")} for row in rows]
    options = {"max_steps": 2, "per_device_train_batch_size": 3, "learning_rate": 1e-2, "report_to": "none"}
    trainer = RewardTrainer(
        model=AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1, dtype=torch.float32),
        args=RewardConfig(str(tmp_path / "run"), use_cpu=True, bf16=False, disable_tqdm=True, **options),
        train_dataset=Dataset.from_list(data),
        processing_class=AutoTokenizer.from_pretrained(tiny_model),
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "source"))
    source = AutoModelForSequenceClassification.from_pretrained(tmp_path / "source").eval()
    assert source.config.pad_token_id == EOS
    sequences = trainer.train_dataset["chosen_ids"]
    assert all(ids[-1] == EOS for ids in sequences)
    with torch.no_grad():
        expected = [source(torch.tensor([ids])).logits.item() for ids in sequences]
    assert np.ptp(expected) > 0.01

    template = "plain" if kind == "texts" else None
    convert_checkpoint(tmp_path / "source", tmp_path / "out", chat_template=template)
    loaded = load_critic(tmp_path / "out")
    encoded = [loaded.encoder.encode(row["prompt"], row["chosen"]).ids for row in rows]
    assert [[*ids, EOS] for ids in encoded] == list(sequences)
    np.testing.assert_allclose(score_sequences(loaded.critic, encoded, 500), expected, rtol=1e-6, atol=1e-6)
    assert_plain_transformers_agrees(tmp_path / "out", rows, expected)


def assert_plain_transformers_agrees(directory: Path, rows: list[dict[str, str]], expected: list[float]) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    texts = [tokenizer.apply_chat_template(conversation(row, "chosen"), tokenize=False) for row in rows]
    with torch.no_grad():
        scores = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits.squeeze(-1)
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-5)
