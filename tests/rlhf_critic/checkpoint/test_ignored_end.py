"""A model that pads with EOS reads its score before the EOS at the end: so does its critic, in every form and place.

Text and token ids, served as it is or converted, exported again, at the start of a training: the score is the source's.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from actors.ppo.critic_group import CriticOptions
from rlhf_critic.checkpoint.convert import convert_checkpoint
from rlhf_critic.checkpoint.critic_directory import CARD_NAME, load_critic, read_card
from rlhf_critic.checkpoint.export import export_critic
from rlhf_critic.checkpoint.reward_model import ignored_end_at_start, open_reward_model
from rlhf_critic.config.model import EncodingConfig, ModelConfig
from rlhf_critic.config.serve import CallLimits
from rlhf_critic.config.train import TrainConfig
from rlhf_critic.data.encoding import Encoder, create_encoder
from rlhf_critic.errors import CheckpointError
from rlhf_critic.scoring.items import Conversation, Text, encode_items
from rlhf_critic.scoring.local import score_sequences
from tests.helpers import save_tiny_model
from tests.rlhf_critic.checkpoint.test_reward_model import (
    EOS,
    change_config,
    plain_scores,
    save_reward_model,
    some_ids,
)

PAIRS = [("please explain", "of course"), ("thank you", "no"), ("a", "glad to</s>"), ("b", "kindly</s></s>")]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    model = save_reward_model(tmp_path / "model", pad_is_eos=True)
    change_config(model, pad_token_id=EOS)
    return model


def messages(prompt: str, response: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


def own_texts(directory: Path) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    return [tokenizer.apply_chat_template(messages(*pair), tokenize=False) for pair in PAIRS]


def own_ids(source: Path) -> list[list[int]]:
    return AutoTokenizer.from_pretrained(source)(own_texts(source), add_special_tokens=False)["input_ids"]


def items_of(source: Path) -> list:
    """The same texts as conversations, texts and ids, and further ids with and without EOS at their end."""
    ids = own_ids(source)
    further = [[*some, *[EOS] * count] for some in some_ids()[1:3] for count in (0, 1, 2)]
    return [*(Conversation(*pair) for pair in PAIRS), *map(Text, own_texts(source)), *ids, *further]


def expected_scores(source: Path) -> list[float]:
    further = [[*some, *[EOS] * count] for some in some_ids()[1:3] for count in (0, 1, 2)]
    return plain_scores(source, [*own_ids(source) * 3, *further])


def scores_of(loaded, items: list) -> np.ndarray:
    encoded = [one.ids for one in encode_items(items, loaded.encoder, CallLimits())]
    return score_sequences(loaded.critic, encoded, 500)


def test_every_form_has_the_sources_score_before_and_after_export(source, tmp_path):
    items, expected = items_of(source), expected_scores(source)
    assert np.ptp(expected) > 0.1, "scores that differ"
    served = open_reward_model(source, "model").load()
    convert_checkpoint(source, tmp_path / "converted")
    export_critic(tmp_path / "converted", tmp_path / "exported", auto_map=False)
    critics = [served, load_critic(tmp_path / "converted"), load_critic(tmp_path / "exported")]
    for critic in critics:
        assert critic.encoder.ignored_end_id == EOS
        np.testing.assert_allclose(scores_of(critic, items), expected, rtol=1e-6, atol=1e-6)
    assert len({critic.encoder.fingerprint for critic in critics}) == 1


def test_other_readers_of_an_export_read_the_same_score_of_a_text(source, tmp_path):
    """Transformers reads the token before its padding, and vLLM the last one. After the template they are the same."""
    convert_checkpoint(source, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer(own_texts(tmp_path / "out"))["input_ids"]
    assert not any(one[-1] in (EOS, tokenizer.pad_token_id) for one in ids)
    np.testing.assert_allclose(plain_scores(tmp_path / "out", ids), expected_scores(source)[:4], rtol=1e-6, atol=1e-6)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        padded = model(**tokenizer.pad({"input_ids": ids}, return_tensors="pt")).logits.squeeze(-1)
    np.testing.assert_allclose(padded, expected_scores(source)[:4], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("start", ["model", "critic"])
def test_training_starts_with_the_encoding_of_its_model(start, source, tmp_path):
    convert_checkpoint(source, tmp_path / "critic", max_length=64)
    model = str(tmp_path / start)
    options = EncodingConfig(max_length=64, special_tokens_in_text="token")
    encoder = create_encoder(model, options, ignored_end_at_start(model))
    served = load_critic(tmp_path / "critic")
    assert encoder.ignored_end_id == EOS
    assert [encoder.encode(*pair).ids for pair in PAIRS] == [served.encoder.encode(*pair).ids for pair in PAIRS]
    of_group = CriticOptions(ModelConfig(path=model), TrainConfig(), options).encoder()
    assert [of_group.encode(*pair).ids for pair in PAIRS] == [encoder.encode(*pair).ids for pair in PAIRS]
    plain = create_encoder(model, EncodingConfig(chat_template="plain"), ignored_end_at_start(model))
    assert plain.encode("please", " no").ids == plain.tokenizer("please no")["input_ids"]


def test_training_of_a_base_model_ignores_nothing(pad_is_eos_base):
    assert ignored_end_at_start(pad_is_eos_base) is None
    encoder = create_encoder(pad_is_eos_base, EncodingConfig())
    assert encoder.encode("please", "no").ids[-1] == EOS


@pytest.fixture
def pad_is_eos_base(tmp_path: Path) -> str:
    return save_tiny_model(tmp_path / "base", tie_word_embeddings=False, pad_is_eos=True, pad_token_id=EOS)


def test_ids_up_to_the_maximum_may_be_followed_by_ignored_ones(source):
    opened = open_reward_model(source, "model")
    longest = [5] * opened.encoder.max_length
    encoded = encode_items([[*longest, EOS, EOS]], opened.encoder, CallLimits())
    assert encoded[0].ids == longest


def test_directories_without_the_field_keep_their_scores(source, tmp_path):
    """They were converted before it: their texts end without the EOS, and their ids are read to the end."""
    convert_checkpoint(source, tmp_path / "old")
    card = json.loads((tmp_path / "old" / CARD_NAME).read_text())
    loaded = load_critic(tmp_path / "old")
    older = Encoder(loaded.encoder.tokenizer, loaded.encoder.max_length)
    del card["encoder"]["ignored_end_id"]
    card["encoder"]["fingerprint"], card["format_version"] = older.fingerprint, 2
    (tmp_path / "old" / CARD_NAME).write_text(json.dumps(card))
    assert read_card(tmp_path / "old").encoder.ignored_end_id is None
    again = load_critic(tmp_path / "old")
    conversations = [Conversation(*pair) for pair in PAIRS]
    np.testing.assert_allclose(scores_of(again, conversations), expected_scores(source)[:4], rtol=1e-6, atol=1e-6)
    with_eos = [*some_ids()[2], EOS]
    assert encode_items([with_eos], again.encoder, CallLimits())[0].ids == with_eos


def test_a_changed_field_is_refused(source, tmp_path):
    convert_checkpoint(source, tmp_path / "out")
    card = json.loads((tmp_path / "out" / CARD_NAME).read_text())
    assert card["encoder"]["ignored_end_id"] == EOS
    card["encoder"]["ignored_end_id"] = None
    (tmp_path / "out" / CARD_NAME).write_text(json.dumps(card))
    with pytest.raises(CheckpointError, match="fingerprint"):
        load_critic(tmp_path / "out")


@pytest.mark.parametrize(
    "mark", [{"value_head_prefix": "score"}, {"normalize_reward": False}, {"architectures": ["RewardModel"]}]
)
def test_openrlhf_reads_at_the_eos_also_in_its_checkpoints_between(mark, source, tmp_path):
    """It pads with EOS and finds the end by the mask. Only its last checkpoint names the head."""
    change_config(source, **mark)
    convert_checkpoint(source, tmp_path / "out")
    loaded = load_critic(tmp_path / "out")
    assert loaded.encoder.ignored_end_id is None
    assert loaded.card.training["chat_template"] == "openrlhf"
    sequence = [*some_ids()[2], EOS]
    encoded = encode_items([sequence], loaded.encoder, CallLimits())[0].ids
    change_config(source, pad_token_id=2, architectures=["LlamaForSequenceClassification"])
    expected = plain_scores(source, [sequence])  # with another pad token the EOS is an ordinary token
    np.testing.assert_allclose(score_sequences(loaded.critic, [encoded], 500), expected, rtol=1e-6, atol=1e-6)
