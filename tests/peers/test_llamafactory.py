"""A reward model that LLaMA-Factory's own trainer made and saved has its scores here, on its token ids."""

import shutil

import pytest

from rlhf_critic.checkpoint.convert import convert_checkpoint
from rlhf_critic.checkpoint.critic_directory import load_critic
from rlhf_critic.checkpoint.interchange import write_for_other_readers
from rlhf_critic.scoring.local import score_sequences


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "adapters"])
def test_a_model_that_it_saved_has_its_scores_here(peer, base, pairs, tmp_path, adapters):
    """It saves a causal language model, or its adapters, with the head and the head's bias in a file of their own."""
    contract = peer("llamafactory")
    rows = [
        {"instruction": str(one.prompt), "chosen": one.response, "rejected": other.response} for one, other in pairs
    ]
    model, theirs, ours = tmp_path / "model", tmp_path / "theirs", tmp_path / "ours"
    shutil.copytree(base, model)
    write_for_other_readers(model)  # its environment has transformers 4
    request = {"model": str(model), "rows": rows, "steps": 2, "save_to": str(theirs), "adapters": adapters}
    answer = contract.run("ask_llamafactory", request)
    card = convert_checkpoint(theirs, ours, base=str(model), head_bias="reward-mean")
    assert card.training["converted_from"] == "llama-factory"
    critic = load_critic(ours).critic
    rewards = score_sequences(critic, answer["chosen_ids"] + answer["rejected_ids"], 2000) + card.training["head_bias"]
    what = f"their checkpoint ({'adapters' if adapters else 'full'}): rlhf-critic export"
    contract.compare(what, answer["chosen"] + answer["rejected"], rewards)


def test_its_client_gets_our_rewards_over_http(peer, serving, export, texts, rewards):
    """What its PPO trainer calls with ``reward_model_type: api``."""
    contract = peer("llamafactory")
    url = serving(export, max_replicas=1)
    answer = contract.run("ask_llamafactory_client", {"url": f"{url}/get_reward", "texts": texts})
    contract.compare("our /get_reward: get_rewards_from_server", answer["scores"], rewards)
