"""Config files of a critic directory have what other readers need: the raw score, and the names of transformers 4."""

import json

import pytest

from rlhf_critic.checkpoint.interchange import write_for_other_readers
from rlhf_critic.data.encoding import Encoder, load_tokenizer
from rlhf_critic.errors import CheckpointError
from tests.rlhf_critic.checkpoint.saved_critics import TOKENIZER_CLASSES, save_tokenizer_of_class

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 64}


def written(directory, config, tokenizer=None):
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer or {}))
    write_for_other_readers(directory)
    return [json.loads((directory / name).read_text()) for name in ("config.json", "tokenizer_config.json")]


@pytest.mark.parametrize(
    ("model_type", "rope", "expected"),
    [
        ("llama", {"rope_type": "default", "rope_theta": 5e5}, {"rope_theta": 5e5, "rope_scaling": None}),
        ("llama", {**LLAMA3, "rope_theta": 5e5}, {"rope_theta": 5e5, "rope_scaling": LLAMA3}),
        (
            "gpt_neox",
            {"rope_type": "default", "rope_theta": 2e4, "partial_rotary_factor": 0.5},
            {"rotary_emb_base": 2e4, "rotary_pct": 0.5, "rope_scaling": None},
        ),
        (
            "stablelm",
            {"rope_type": "default", "rope_theta": 2e4, "partial_rotary_factor": 0.5},
            {"rope_theta": 2e4, "partial_rotary_factor": 0.5, "rope_scaling": None},
        ),
        (
            "phi3",
            {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0], "long_factor": [2.0], "factor": 4.0},
            {"rope_theta": 1e4, "rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}},
        ),
        (
            "gemma3_text",
            {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
            {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        ),
    ],
)
def test_positions_have_the_names_of_transformers_4_too(model_type, rope, expected, tmp_path):
    saved = {"model_type": model_type, "dtype": "bfloat16", "architectures": ["LlamaForSequenceClassification"]}
    config, _ = written(tmp_path, {**saved, "rope_parameters": rope})
    added = {"problem_type": "regression", "torch_dtype": "bfloat16", **expected}
    assert config == {**saved, "rope_parameters": rope, **added}


def test_a_config_without_rotary_positions_gets_none(tmp_path):
    config, _ = written(tmp_path, {"model_type": "gpt2", "architectures": ["GPT2ForSequenceClassification"]})
    assert not [name for name in config if "rop" in name and name != "problem_type"]


def test_an_auto_map_is_removed_with_its_file(tmp_path):
    (tmp_path / "modeling_llama_reward.py").write_text("")
    auto_map = {"AutoModelForSequenceClassification": "modeling_llama_reward.LlamaRewardModel"}
    for names in (["LlamaRewardModel"], ["LlamaForSequenceClassification", "LlamaRewardModel"]):
        config, _ = written(tmp_path, {"model_type": "llama", "architectures": names, "auto_map": auto_map})
        assert config["architectures"] == ["LlamaForSequenceClassification"]
        assert "auto_map" not in config
    assert not (tmp_path / "modeling_llama_reward.py").exists()


def test_the_tokenizer_loads_in_both_versions(tmp_path):
    _, tokenizer = written(tmp_path, {}, {"tokenizer_class": "TokenizersBackend", "eos_token": "</s>"})
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert tokenizer["model_input_names"] == ["input_ids", "attention_mask"]


@pytest.mark.parametrize("name", TOKENIZER_CLASSES)
def test_the_class_of_a_family_is_replaced_without_changing_an_id(name, tmp_path):
    """In transformers 4 a family's class may add BOS to texts that have one from the template, or not exist."""
    encoder = save_tokenizer_of_class(name, tmp_path)
    encoder.save(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    write_for_other_readers(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    again = Encoder(load_tokenizer(str(tmp_path), keeps_template=True), encoder.max_length)
    assert again.fingerprint == encoder.fingerprint
    pair = ("please  explain", " of\ncourse caf\u00e9 </s>")
    assert again.encode(*pair).ids == encoder.encode(*pair).ids


def test_a_config_that_is_no_json_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: not a valid config"):
        write_for_other_readers(tmp_path)
