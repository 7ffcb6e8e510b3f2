"""OpenRLHF's reward model reads an export as this project does, and its executor gets our rewards over HTTP."""

import itertools
import shutil
from urllib.parse import unquote

import pytest
from transformers import AutoTokenizer

from rlhf_critic.checkpoint.convert import convert_checkpoint
from rlhf_critic.checkpoint.critic_directory import load_critic
from tests.actors.scorers import rewards_by_engine
from tests.peers.contract import turns_of

TURNS = {"chosen_key": "chosen", "rejected_key": "rejected", "apply_chat_template": True}
TEXTS = {"prompt_key": "prompt", "chosen_key": "chosen", "rejected_key": "rejected", "apply_chat_template": False}


def rows_of_turns(pairs):
    chosen, rejected = (turns_of(side) for side in zip(*pairs, strict=True))
    return [{"chosen": one, "rejected": other} for one, other in zip(chosen, rejected, strict=True)]


def ours_of(critic, pairs):
    return [*itertools.chain(*(rewards_by_engine(critic, list(side)) for side in zip(*pairs, strict=True)))]


def test_their_reward_model_scores_our_export_with_our_numbers(peer, export, texts, rewards, pairs):
    contract = peer("openrlhf")
    request = {"model": export, "texts": texts, "rows": rows_of_turns(pairs), "keys": TURNS}
    answer = contract.run("ask_openrlhf", request)
    contract.compare("our export: its RewardModel, left padding as in serve_rm", answer["scores"], rewards)
    theirs = answer["chosen"] + answer["rejected"]
    contract.compare("our export: its RewardModel and RewardDataset, turns", theirs, ours_of(export, pairs))


def test_a_model_that_they_saved_has_their_scores_here(peer, base, pairs, tmp_path):
    """OpenRLHF removes line breaks at the end, and ends a text without EOS by a space and EOS."""
    contract = peer("openrlhf")
    lines = tmp_path / "lines"  # a base model whose turns end with a line break, as ChatML's do
    shutil.copytree(base, lines)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = (
        "{% for turn in messages %}<{{ turn['role'] }}>{{ turn['content'] }}{{ '\\n' }}{% endfor %}"
    )
    tokenizer.save_pretrained(lines)
    texts = [{"prompt": one.prompt, "chosen": one.response, "rejected": other.response} for one, other in pairs]
    for template, rows, keys in (("openrlhf", rows_of_turns(pairs), TURNS), ("openrlhf-plain", texts, TEXTS)):
        theirs, ours = tmp_path / f"theirs-{template}", tmp_path / f"ours-{template}"
        request = {"model": str(lines), "rows": rows, "keys": keys, "train_to": str(theirs)}
        answer = contract.run("ask_openrlhf", request)
        convert_checkpoint(theirs, ours, max_length=512, chat_template=template)
        encoded = load_critic(ours).encoder.encode_batch([one for one, _ in pairs])
        assert [one.ids for one in encoded] == answer["ids"]
        what = f"their checkpoint: rlhf-critic export --chat-template {template}"
        contract.compare(what, answer["chosen"] + answer["rejected"], ours_of(str(ours), pairs))


def test_a_checkpoint_between_has_their_scores_here_though_it_pads_with_eos(peer, base, pairs, tmp_path):
    """It does not name its head, as the last one does; OpenRLHF reads at the EOS all the same."""
    contract = peer("openrlhf")
    theirs, ours, padded = tmp_path / "theirs", tmp_path / "ours", tmp_path / "padded"
    shutil.copytree(base, padded)
    AutoTokenizer.from_pretrained(base, pad_token="</s>").save_pretrained(padded)
    request = {"model": str(padded), "rows": rows_of_turns(pairs), "keys": TURNS, "train_to": str(theirs)}
    answer = contract.run("ask_openrlhf", {**request, "is_last": False})
    assert answer["pad_is_eos"]
    assert "value_head_prefix" not in (theirs / "config.json").read_text()
    convert_checkpoint(theirs, ours, max_length=512)
    what = "their checkpoint between (pad = EOS): rlhf-critic export"
    contract.compare(what, answer["chosen"] + answer["rejected"], ours_of(str(ours), pairs))


def test_their_executor_shows_why_a_request_was_refused(peer, serving, export, base):
    contract = peer("openrlhf")
    url = serving(export, max_replicas=1)
    request = {"model": base, "url": f"{url}/get_reward", "prompts": ["please"], "responses": ["1 " * 40_000]}
    answer = contract.run("ask_openrlhf", request)
    assert not answer["rewards"]
    assert any("422" in line and "tokens, maximum" in unquote(line) for line in answer["logged"]), answer["logged"]


@pytest.mark.parametrize("ended", [True, False], ids=["response with EOS", "response cut before EOS"])
def test_their_executor_gets_our_rewards_over_http(peer, serving, export, base, conversations, rewards, ended):
    contract = peer("openrlhf")
    url = serving(export, max_replicas=1)
    encoder = load_critic(export).encoder
    request = {
        "model": base,
        "url": f"{url}/get_reward",
        "prompts": [encoder.open(one.prompt) for one in conversations],
        "responses": [one.response + (encoder.ending if ended else "") for one in conversations],
    }
    answer = contract.run("ask_openrlhf", request)
    assert answer["scores"] == answer["rewards"]
    how = "with EOS" if ended else "cut before EOS"
    contract.compare(f"our /get_reward: its SingleTurnAgentExecutor, responses {how}", answer["rewards"], rewards)
