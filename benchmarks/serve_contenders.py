"""Peers of the pool of scorers, each in a separate process.

``direct`` scores all sequences in one big list with the engine itself: no server, no queue. ``reference`` is a FastAPI
server in the manner of OpenRLHF's: for every request it tokenises, pads to the longest text and runs one forward pass.
"""

from __future__ import annotations

import time

import torch
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from benchmarks.harness import Result, Specification, contender
from benchmarks.workloads import PROFILES, draw_prompts
from rlhf_critic.checkpoint.critic_directory import load_critic
from rlhf_critic.scoring.local import score_sequences

WARM_UP = 8


def direct(specification: Specification) -> Result:
    """Measures sequences per second, from token ids to rewards."""
    drawn = draw_prompts(PROFILES[specification["profile"]], specification["prompts"], specification["n"])
    sequences = [sequence.tolist() for responses in drawn for sequence in responses]
    critic = load_critic(specification["critic"]).critic
    score_sequences(critic, sequences[:WARM_UP], specification["token_budget"])
    started = time.perf_counter()
    rewards = score_sequences(critic, sequences, specification["token_budget"])
    seconds = time.perf_counter() - started
    return {"sequences_per_second": len(sequences) / seconds, "rewards": rewards.tolist()}


class Query(BaseModel):
    """Request of a client."""

    query: list[str]


def reference(specification: Specification) -> Result:
    """Serves until the process ends."""
    tokenizer = AutoTokenizer.from_pretrained(specification["critic"], padding_side="right")
    model = AutoModelForSequenceClassification.from_pretrained(specification["critic"], dtype=torch.float32).eval()
    app = FastAPI()

    @app.post("/get_reward")
    async def get_reward(request: Query) -> dict[str, list[float]]:
        with torch.inference_mode():
            batch = tokenizer(request.query, padding=True, return_tensors="pt")
            inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
            return {"rewards": model(**inputs).logits[:, 0].tolist()}

    uvicorn.run(app, host="127.0.0.1", port=specification["port"], log_level="error")
    return {}


def work(specification: Specification) -> Result:
    """Runs the contender."""
    return {"direct": direct, "reference": reference}[specification["contender"]](specification)


if __name__ == "__main__":
    contender(work)
