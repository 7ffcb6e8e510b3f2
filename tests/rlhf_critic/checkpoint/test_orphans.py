"""Value heads that TRL and OpenRLHF no longer have, and heads with two labels, keep their scores."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForTokenClassification

from rlhf_critic.checkpoint.convert import convert_checkpoint
from rlhf_critic.data.encoding import load_tokenizer
from rlhf_critic.errors import CheckpointError
from rlhf_critic.model.factory import check_critic_model, create_critic_model
from tests.helpers import save_tiny_tokenizer, tiny_config
from tests.rlhf_critic.checkpoint.test_convert import SMALL, random_reward_model, rewards_of, save_foreign, text_ids

BIAS = -0.625


def last_values(body, head) -> list[float]:
    """The head on the hidden state of the last token, as these systems define their score of a sequence."""
    with torch.no_grad():
        return [head(body(torch.tensor([ids])).last_hidden_state)[0, -1].item() for ids in text_ids()]


@pytest.mark.parametrize(("name", "backbone"), [("llama", "model."), ("gpt2", "transformer."), ("opt", "model.")])
def test_a_value_head_of_trl(name, backbone, tmp_path):
    body, head = random_reward_model(name, BIAS)
    heads = {"v_head.summary.weight": head.weight.data, "v_head.summary.bias": head.bias.data}
    source = save_foreign(tmp_path / "source", body, backbone, heads)
    card = convert_checkpoint(source, tmp_path / "out", head_bias="reward-mean")
    assert card.training["converted_from"] == "trl-value-head"
    rewards = rewards_of(tmp_path / "out", text_ids())
    np.testing.assert_allclose(rewards + card.training["head_bias"], last_values(body, head), rtol=0, atol=1e-5)


@pytest.mark.parametrize("architecture", ["CriticModel", "RewardModel"])
def test_an_older_critic_of_openrlhf(architecture, tmp_path):
    body, head = random_reward_model("llama")
    body.config.architectures = [architecture]
    source = save_foreign(tmp_path / "source", body, "model.", {"value_head.weight": head.weight.data})
    card = convert_checkpoint(source, tmp_path / "out")
    assert (card.training["converted_from"], card.training["chat_template"]) == ("openrlhf-critic", "openrlhf")
    np.testing.assert_allclose(rewards_of(tmp_path / "out", text_ids()), last_values(body, head), rtol=0, atol=1e-5)


@pytest.fixture
def process_reward_model(tmp_path) -> Path:
    """A token classifier with two labels, as TRL's PRMTrainer saves it; it pads with EOS."""
    source = tmp_path / "source"
    save_tiny_tokenizer(source)
    torch.manual_seed(3)
    model = AutoModelForTokenClassification.from_config(tiny_config(333, num_labels=2, **SMALL))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(source)
    return source


def test_two_labels_give_the_log_odds_of_the_second(process_reward_model, tmp_path):
    card = convert_checkpoint(process_reward_model, tmp_path / "out", "two-labels", head_bias="reward-mean")
    plain = AutoModelForTokenClassification.from_pretrained(process_reward_model).eval()
    with torch.no_grad():
        expected = [plain(torch.tensor([ids])).logits.softmax(-1)[0, -1, 1].item() for ids in text_ids()]
    assert np.ptp(expected) > 0.01
    rewards = torch.from_numpy(rewards_of(tmp_path / "out", text_ids())) + card.training["head_bias"]
    np.testing.assert_allclose(rewards.sigmoid(), expected, rtol=0, atol=1e-5)


def test_two_labels_are_taken_only_if_asked_for(process_reward_model, tmp_path):
    with pytest.raises(CheckpointError, match=r"2 outputs \(labels\), expected 1: .* --from two-labels"):
        convert_checkpoint(process_reward_model, tmp_path / "out")
    body, head = random_reward_model("llama")
    one = save_foreign(tmp_path / "one", body, "model.", {"score.weight": head.weight.data})
    with pytest.raises(CheckpointError, match=r"shape \(1, 32\), but --from two-labels is for two outputs"):
        convert_checkpoint(one, tmp_path / "out", "two-labels")


def own_file(source: Path, head: torch.nn.Linear) -> None:
    torch.save({"v_head.summary.weight": head.weight.data}, source / "value_head.bin")


HEADS = {
    "another name": (lambda source, head: {"v_head.summary.weight": head.weight.data}, r"\(v_head\.summary\.weight\)"),
    "a file of its own": (lambda source, head: own_file(source, head) or {}, r"in a file of its own"),
    "two outputs": (
        lambda source, head: {"score.weight": head.weight.data.repeat(2, 1)},
        r"with two outputs \(score\.weight\), .* --from two-labels, and train from OUT",
    ),
}


@pytest.mark.parametrize("build", [check_critic_model, lambda *arguments: create_critic_model(*arguments, None)])
@pytest.mark.parametrize("what", HEADS)
def test_training_refuses_a_trained_head_that_it_would_ignore(what, build, tmp_path):
    heads_of, message = HEADS[what]
    body, head = random_reward_model("llama")
    source = tmp_path / "source"
    save_foreign(source, body, "model.", {})
    save_foreign(source, body, "model.", heads_of(source, head))
    with pytest.raises(CheckpointError, match=rf"has a trained head .*{message}") as refused:
        build(str(source), load_tokenizer(str(source)))
    assert f"rlhf-critic export {source} OUT" in str(refused.value)
