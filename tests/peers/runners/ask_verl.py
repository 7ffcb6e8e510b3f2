"""Asks for rewards as verl's reward loop does for a discriminative reward model on vLLM.

Request: ``address`` (host:port), ``model``, ``policy``, ``prompts`` (turns) and ``responses``.
"""

import asyncio
import json
import sys

import numpy as np
import torch
from omegaconf import OmegaConf
from tensordict import TensorDict
from transformers import AutoTokenizer
from verl import DataProto
from verl.experimental.reward_loop.reward_loop import RewardLoopWorker

with open(sys.argv[1], encoding="utf-8") as file:
    request = json.load(file)
config = OmegaConf.create(
    {
        "actor_rollout_ref": {"model": {"path": request["policy"], "tokenizer_path": None}},
        "reward": {
            "custom_reward_function": {"path": None, "name": None},
            "reward_manager": {"source": "register", "name": "naive"},
            "reward_model": {"enable": True, "model_path": request["model"], "rollout": {"name": "vllm"}},
        },
    }
)
tokenizer = AutoTokenizer.from_pretrained(request["policy"])


def batch_of(turns, response):
    """One rollout, padded on the right, as verl's rollout workers make it."""
    ids = tokenizer(response, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    padded = torch.zeros(1, len(ids) + 5, dtype=torch.long)
    padded[0, : len(ids)] = torch.tensor(ids)
    prompt = torch.zeros(1, 3, dtype=torch.long)
    mask = torch.cat([torch.ones_like(prompt), (torch.arange(len(ids) + 5) < len(ids)).long()[None]], dim=1)
    tensors = TensorDict({"prompts": prompt, "responses": padded, "attention_mask": mask}, batch_size=1)
    raw_prompt = np.empty(1, dtype=object)
    raw_prompt[0] = turns
    return DataProto(batch=tensors, non_tensor_batch={"raw_prompt": raw_prompt})


async def ask():
    """Returns the score of every rollout; asks for all of them at once."""
    worker = RewardLoopWorker(config, request["address"])
    rollouts = zip(request["prompts"], request["responses"], strict=True)
    answers = await asyncio.gather(*(worker.compute_score(batch_of(*rollout)) for rollout in rollouts))
    return [one["reward_score"] for one in answers]


async def main():
    """Writes the scores."""
    scores = await ask()
    with open(sys.argv[2], "w", encoding="utf-8") as file:
        json.dump({"scores": scores}, file)


asyncio.run(main())
