"""Transformers 4, which other projects pin, and the current one give an export our rewards, and the reverse."""

import json

import numpy as np
import pytest

from rlhf_critic.checkpoint.convert import convert_checkpoint
from rlhf_critic.checkpoint.interchange import write_for_other_readers
from tests.actors.scorers import MAX_LENGTH, make_conversations, rewards_by_engine
from tests.peers.contract import turns_of
from tests.rlhf_critic.checkpoint.saved_critics import TOKENIZER_CLASSES, save_tokenizer_of_class

# TRL's environment has the newest transformers.
VERSIONS = ["transformers-4.51", "transformers-4.57", "trl"]


@pytest.fixture(scope="module")
def asked(conversations):
    """Conversations, of which some are longer than the critic's maximum."""
    return [*conversations, *make_conversations(6, seed=5)]


@pytest.fixture(scope="module")
def ask(export, asked, tmp_path_factory):
    """Asks each version once; returns its answer and the directory that it saved."""
    answers = {}

    def once(contract):
        if contract.name not in answers:
            saved = str(tmp_path_factory.mktemp("saved") / "theirs")
            request = {"directory": export, "messages": turns_of(asked), "save_to": saved}
            answers[contract.name] = contract.run("ask_transformers", request), saved
        return answers[contract.name]

    return once


@pytest.mark.parametrize("version", VERSIONS)
def test_plain_transformers_has_our_rewards(peer, ask, export, asked, version):
    contract = peer(version)
    answer, _ = ask(contract)
    assert answer["class"] == "LlamaForSequenceClassification"
    assert answer["inputs"] == ["input_ids", "attention_mask"], "Llama takes no token types"
    ours = rewards_by_engine(export, asked)
    for how, said in {"alone": "one text a call", "right": "right padding", "left": "left padding"}.items():
        contract.compare(f"our export: AutoModelForSequenceClassification, {said}", answer[how], ours)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_pipeline_without_options_has_our_rewards(peer, ask, export, asked, version):
    contract = peer(version)
    answer, _ = ask(contract)
    what = "our export: pipeline('text-classification') without options"
    contract.compare(what, answer["pipeline"], rewards_by_engine(export, asked))


@pytest.mark.parametrize("version", VERSIONS)
def test_we_have_the_rewards_of_a_model_that_they_saved(peer, ask, asked, tmp_path, version):
    contract = peer(version)
    answer, saved = ask(contract)
    convert_checkpoint(saved, tmp_path / "ours", max_length=MAX_LENGTH)
    contract.compare(
        "their checkpoint: rlhf-critic export", answer["alone"], rewards_by_engine(str(tmp_path / "ours"), asked)
    )


@pytest.mark.parametrize("version", VERSIONS)
def test_tokenizers_of_families_give_our_ids(peer, conversations, tmp_path, version):
    """Their own classes in transformers 4 add BOS again, or are other classes than those of transformers 5."""
    contract = peer(version)
    directories, ours = [], []
    for name in TOKENIZER_CLASSES:
        encoder = save_tokenizer_of_class(name, tmp_path / f"base-{name}")
        directory = tmp_path / name
        encoder.save(directory)
        (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
        write_for_other_readers(directory)
        directories.append(str(directory))
        ours.append([one.ids for one in encoder.encode_batch(conversations)])
    answer = contract.run("ask_tokenizers", {"directories": directories, "messages": turns_of(conversations)})
    theirs = answer["ids"]
    assert [[len(ids) for ids in texts] for texts in theirs] == [[len(ids) for ids in texts] for texts in ours]
    what = f"our export: AutoTokenizer, ids by {len(TOKENIZER_CLASSES)} classes"
    flat = [np.concatenate([token for texts in side for token in texts]) for side in (theirs, ours)]
    contract.compare(what, *flat)
