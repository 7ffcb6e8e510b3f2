"""Transformers 4, which other projects pin, and the current one give an export our rewards, and the reverse."""

import pytest

from rlhf_critic.checkpoint.convert import convert_checkpoint
from tests.actors.scorers import MAX_LENGTH, make_conversations, rewards_by_engine
from tests.peers.contract import turns_of


# TRL's environment has the newest transformers.
@pytest.mark.parametrize("version", ["transformers-4.51", "transformers-4.57", "trl"])
def test_plain_transformers_has_our_rewards_and_we_have_those_of_what_it_saves(
    peer, export, conversations, tmp_path, version
):
    contract = peer(version)
    asked = [*conversations, *make_conversations(6, seed=5)]  # some are longer than the critic's maximum
    answer = contract.run(
        "ask_transformers", {"directory": export, "messages": turns_of(asked), "save_to": str(tmp_path / "theirs")}
    )
    assert answer["class"] == "LlamaForSequenceClassification"
    assert answer["inputs"] == ["input_ids", "attention_mask"], "Llama takes no token types"
    ours = rewards_by_engine(export, asked)
    for how, said in {"alone": "one text a call", "right": "right padding", "left": "left padding"}.items():
        contract.compare(f"our export: AutoModelForSequenceClassification, {said}", answer[how], ours)
    contract.compare("our export: pipeline('text-classification') without options", answer["pipeline"], ours)

    convert_checkpoint(tmp_path / "theirs", tmp_path / "ours", max_length=MAX_LENGTH)
    imported = rewards_by_engine(str(tmp_path / "ours"), asked)
    contract.compare("their checkpoint: rlhf-critic export", answer["alone"], imported)
