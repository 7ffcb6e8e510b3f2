"""Adapters of peft and heads in files of their own are converted, or refused with what they need."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf_critic.checkpoint.convert import convert_checkpoint
from rlhf_critic.checkpoint.critic_directory import load_critic
from rlhf_critic.checkpoint.reward_model import check_reward_model
from rlhf_critic.errors import CheckpointError
from rlhf_critic.model.weights import WeightReader
from rlhf_critic.scoring.local import score_sequences
from tests.helpers import save_tiny_tokenizer
from tests.rlhf_critic.checkpoint.test_reward_model import EOS, some_ids

HIDDEN = 32


def save_adapters(base: str, directory: Path, task: str, **saved: list[str]) -> PeftModel:
    """Saves adapters with random weights, and the tokenizer with EOS as pad token, as TRL does; returns the model."""
    torch.manual_seed(5)
    if task == "SEQ_CLS":
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, pad_token_id=EOS)
        torch.nn.init.normal_(model.score.weight)
    else:
        model = AutoModelForCausalLM.from_pretrained(base)
    adapted = get_peft_model(model, LoraConfig(r=4, task_type=task, target_modules=["q_proj", "v_proj"], **saved))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    adapted.save_pretrained(directory)
    save_tiny_tokenizer(directory, pad_is_eos=True)
    return adapted.eval()


def rewards_of(directory: Path, sequences: list[list[int]]) -> np.ndarray:
    return score_sequences(load_critic(directory).critic, sequences, 500)


def test_merged_adapters_have_the_score_of_the_adapted_model(tiny_model, tmp_path):
    adapted = save_adapters(tiny_model, tmp_path / "adapters", "SEQ_CLS")
    with torch.no_grad():
        expected = [adapted(torch.tensor([ids])).logits.item() for ids in some_ids()]
    assert np.ptp(expected) > 0.1, "scores that differ"
    card = convert_checkpoint(tmp_path / "adapters", tmp_path / "out", base=tiny_model)
    assert card.version == "adapters@native"
    assert card.encoder.ignored_end_id == EOS, "the pad token of the adapters' tokenizer, which the base model lacks"
    np.testing.assert_allclose(rewards_of(tmp_path / "out", some_ids()), expected, rtol=0, atol=1e-5)


def test_adapters_without_a_base_a_head_or_a_known_task_are_refused(tiny_model, tmp_path):
    source = tmp_path / "adapters"
    save_adapters(tiny_model, source, "SEQ_CLS")
    with pytest.raises(CheckpointError, match=r"adapters of peft, trained on .*: give it with --base"):
        convert_checkpoint(source, tmp_path / "out")
    path = source / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(path).items() if "score" not in name}, path)
    with pytest.raises(CheckpointError, match=r"have a head \(score.weight\).*modules_to_save"):
        convert_checkpoint(source, tmp_path / "out", base=tiny_model)
    config = json.loads((source / "adapter_config.json").read_text())
    (source / "adapter_config.json").write_text(json.dumps({**config, "task_type": "TOKEN_CLS"}))
    with pytest.raises(CheckpointError, match=r"task_type: the adapters are for TOKEN_CLS"):
        convert_checkpoint(source, tmp_path / "out", base=tiny_model)
    assert not (tmp_path / "out").exists()


def save_value_head(directory: Path) -> torch.nn.Linear:
    """Saves a head as trl's ``AutoModelForCausalLMWithValueHead``, which LLaMA-Factory trains, names it."""
    head = torch.nn.Linear(HIDDEN, 1)
    torch.nn.init.normal_(head.weight)
    heads = {"v_head.summary.weight": head.weight.data, "v_head.summary.bias": head.bias.data}
    save_file(heads, directory / "value_head.safetensors")
    return head


def scores_at_the_last_token(model: torch.nn.Module, head: torch.nn.Linear, sequences: list[list[int]]) -> list[float]:
    with torch.no_grad():
        hidden = [model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1] for ids in sequences]
        return [head(states)[0, -1].item() for states in hidden]


@pytest.mark.parametrize("kind", ["full", "adapters"])
def test_a_reward_model_of_llama_factory_keeps_its_scores(kind, tiny_model, tmp_path):
    source, sequences = tmp_path / "source", [*some_ids(), [*some_ids()[2], EOS]]
    if kind == "full":
        model = AutoModelForCausalLM.from_pretrained(tiny_model, pad_token_id=EOS).eval()
        model.save_pretrained(source)
        AutoTokenizer.from_pretrained(tiny_model).save_pretrained(source)
    else:
        model = save_adapters(tiny_model, source, "CAUSAL_LM")
    head = save_value_head(source)
    expected = scores_at_the_last_token(model, head, sequences)
    with pytest.raises(CheckpointError, match=r"--head-bias reward-mean"):
        convert_checkpoint(source, tmp_path / "out", base=tiny_model)
    card = convert_checkpoint(source, tmp_path / "out", base=tiny_model, head_bias="reward-mean")
    assert card.training["converted_from"] == "llama-factory"
    assert card.encoder.ignored_end_id is None, "it reads the last token of the mask, which is the EOS"
    rewards = rewards_of(tmp_path / "out", sequences) + card.training["head_bias"]
    np.testing.assert_allclose(rewards, expected, rtol=1e-5, atol=1e-5)


def test_what_is_served_names_the_importer_that_it_needs(tiny_model, tmp_path):
    source = tmp_path / "source"
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(source)
    save_value_head(source)
    with pytest.raises(CheckpointError, match=r"rlhf-critic export my/model OUT --from llama-factory"):
        check_reward_model(source, "my/model")


MAKERS = {
    "adapter_config.json": "rlhf-critic export ADAPTERS OUT --base",
    "zero_to_fp32.py": "zero_to_fp32.py",
    "global_step5/mp_rank_00_model_states.pt": "zero_to_fp32.py",
    "model_world_size_2_rank_0.pt": "verl.model_merger",
    "__0_0.distcp": "accelerate merge-weights",
}


@pytest.mark.parametrize("name", MAKERS)
def test_what_is_no_model_yet_names_the_tool_that_makes_one(name, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("")
    with pytest.raises(CheckpointError, match=MAKERS[name]):
        WeightReader(str(tmp_path))
