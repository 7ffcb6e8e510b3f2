"""Files of mixtures of experts have the layout that transformers writes, and are read whole or not at all."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from rlhf_critic.config.model import ModelConfig
from rlhf_critic.data.encoding import load_tokenizer
from rlhf_critic.errors import CheckpointError
from rlhf_critic.model.critic import Critic
from rlhf_critic.model.factory import create_critic_model
from rlhf_critic.model.lora import add_adapters
from rlhf_critic.model.weights import save_weights
from tests.rlhf_critic.families import family_configs, kernels_of, random_model, save_base_model

MIXTURES = ["deepseek_v3", "gpt_oss", "mixtral", "phimoe", "qwen2_moe", "qwen3_moe"]
FIRST_EXPERT = {  # as transformers 4 and vLLM read it
    "mixtral": "model.layers.0.block_sparse_moe.experts.0.w1.weight",
    "phimoe": "model.layers.0.block_sparse_moe.experts.0.w1.weight",
    "qwen2_moe": "model.layers.0.mlp.experts.0.gate_proj.weight",
    "qwen3_moe": "model.layers.0.mlp.experts.0.gate_proj.weight",
    "deepseek_v3": "model.layers.1.mlp.experts.0.gate_proj.weight",
    "gpt_oss": "model.layers.0.mlp.experts.gate_up_proj",
}


def of_family(name: str) -> PreTrainedModel:
    config = family_configs()[name]
    return random_model(config, kernels_of(config)[0])


@pytest.fixture
def mixtral(tmp_path) -> Path:
    save_base_model("mixtral", tmp_path)
    return tmp_path


def create(directory: Path) -> Critic:
    return create_critic_model(str(directory), load_tokenizer(str(directory)), None)


@pytest.mark.parametrize("name", MIXTURES)
def test_the_file_is_that_of_transformers(name, tmp_path):
    model = of_family(name)
    model.save_pretrained(tmp_path / "theirs")
    (tmp_path / "ours").mkdir()
    save_weights(Critic(model).model, tmp_path / "ours", is_main=True)
    theirs, ours = (load_file(tmp_path / who / "model.safetensors") for who in ("theirs", "ours"))
    assert FIRST_EXPERT[name] in ours
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("original", [True, False], ids=["an entry an expert", "merged"])
def test_both_layouts_of_files_are_read(mixtral, original):
    expected = AutoModelForCausalLM.from_pretrained(mixtral)
    expected.save_pretrained(mixtral, save_original_format=original)
    assert any(".experts.0.w1" in key for key in load_file(mixtral / "model.safetensors")) == original
    body = dict(expected.model.named_parameters())
    for name, parameter in create(mixtral).model.model.named_parameters():
        assert name == "embed_tokens.weight" or torch.equal(parameter, body[name]), name


def test_an_export_of_adapters_has_experts_and_merged_matrices(tmp_path):
    model = of_family("mixtral")
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    critic = Critic(model)
    add_adapters(critic.model, ModelConfig(lora_rank=2), seed=0)
    trained = {name.rsplit(".", 2)[0] for name, one in critic.named_parameters() if one.requires_grad}
    assert {name.rsplit(".", 1)[-1] for name in trained} == {"lora_A", "lora_B", "model"}
    with torch.no_grad():
        for name, parameter in critic.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    save_weights(critic.model, tmp_path, is_main=True)
    files = load_file(tmp_path / "model.safetensors")
    assert not any("lora" in key or "base_layer" in key for key in files)
    model.config.save_pretrained(tmp_path)
    saved, report = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, tensor in saved.state_dict().items():
        assert torch.equal(tensor, plain[name]) == ("self_attn" not in name), name


def change(directory: Path, edit) -> None:
    weights = load_file(directory / "model.safetensors")
    edit(weights)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def test_a_missing_expert_is_an_error_that_names_the_layer(mixtral):
    change(mixtral, lambda weights: weights.pop("model.layers.1.block_sparse_moe.experts.2.w2.weight"))
    with pytest.raises(CheckpointError, match=r"shape: model\.layers\.1\.mlp\.experts\.down_proj: \(3, 32, 48\) in"):
        create(mixtral)
    change(mixtral, lambda weights: weights.pop("model.layers.0.block_sparse_moe.experts.2.w3.weight"))
    with pytest.raises(CheckpointError, match=r"experts: model\.layers\.0\.mlp\.experts\.gate_up_proj: 7 entries"):
        create(mixtral)


def test_an_error_lists_at_most_ten_of_thousands_of_keys(mixtral):
    def edit(weights: dict) -> None:
        for number in range(3000):
            weights[f"model.layers.0.other.{number}.weight"] = torch.zeros(1)
        del weights["model.norm.weight"]

    change(mixtral, edit)
    with pytest.raises(CheckpointError) as refused:
        create(mixtral)
    lines = str(refused.value).splitlines()
    assert len(lines) <= 13
    assert "  missing: model.norm.weight" in lines
    assert "  unexpected: and 2995 more" in lines
