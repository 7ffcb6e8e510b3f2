"""Infinity scores an export's texts with our rewards, as a reranker: it takes every model with one label for one."""

import numpy as np

from rlhf_critic.checkpoint.critic_directory import load_critic


def test_infinity_ranks_with_our_raw_rewards(peer, export, texts, rewards):
    contract = peer("infinity")
    ending = load_critic(export).encoder.ending
    assert all(text.endswith(ending) for text in texts)
    answer = contract.run("ask_infinity", {"model": export, "texts": texts, "ending": ending})
    sigmoid = 1 / (1 + np.exp(-rewards))
    contract.compare("our export: engine.rerank, raw_scores=True", answer["raw"], rewards)
    contract.compare("our export: engine.rerank, sigmoid of our rewards", answer["as_it_is"], sigmoid)
