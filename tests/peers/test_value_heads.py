"""Value heads that TRL had until 2026 keep their values here, as TRL's own class saved and computed them."""

import shutil

import pytest

from rlhf_critic.checkpoint.convert import convert_checkpoint
from rlhf_critic.checkpoint.critic_directory import load_critic
from rlhf_critic.checkpoint.interchange import write_for_other_readers
from rlhf_critic.data.encoding import Encoder, load_tokenizer
from rlhf_critic.scoring.local import score_sequences


@pytest.mark.parametrize(("environment", "version"), [("rewardbench", "0.11"), ("llamafactory", "0.24")])
def test_a_causal_model_with_a_value_head(peer, base, conversations, tmp_path, environment, version):
    """Both environments pin an older TRL, which has this class."""
    contract = peer(environment)
    model, theirs = tmp_path / "model", tmp_path / "theirs"
    shutil.copytree(base, model)
    write_for_other_readers(model)  # these environments have transformers 4
    ids = [list(map(int, one.ids)) for one in Encoder(load_tokenizer(base), 512).encode_batch(conversations)]
    answer = contract.run("ask_value_head", {"model": str(model), "ids": ids, "save_to": str(theirs)})
    card = convert_checkpoint(theirs, tmp_path / "ours", base=str(model), head_bias="reward-mean")
    assert card.training["converted_from"] == "trl-value-head"
    rewards = score_sequences(load_critic(tmp_path / "ours").critic, ids, 2000) + card.training["head_bias"]
    contract.compare(f"TRL {version}: AutoModelForCausalLMWithValueHead: rlhf-critic export", answer["values"], rewards)
