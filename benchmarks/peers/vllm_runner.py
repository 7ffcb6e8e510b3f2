"""Scores token ids with vLLM, in its own environment. Imports nothing of this project.

Usage: vllm_runner.py REQUEST ANSWER. The request has ``model``, ``sequences``, ``max_length`` and ``prefix_caching``.
"""

import json
import sys
import time

from vllm import LLM, PoolingParams

WARM_UP = 8


def main() -> None:
    """Answers with the rewards and the seconds from token ids to rewards, after a warm-up with other sequences."""
    with open(sys.argv[1], encoding="utf-8") as file:
        request = json.load(file)
    llm = LLM(
        model=request["model"],
        runner="pooling",
        dtype="float32",
        max_model_len=request["max_length"],
        enable_prefix_caching=request["prefix_caching"],
    )
    raw = PoolingParams(use_activation=False)

    def score(sequences: list[list[int]]) -> list[float]:
        prompts = [{"prompt_token_ids": ids} for ids in sequences]
        return [one.outputs.probs[0] for one in llm.classify(prompts, pooling_params=raw, use_tqdm=False)]

    score([ids[::-1] for ids in request["sequences"][:WARM_UP]])
    started = time.perf_counter()
    rewards = score(request["sequences"])
    with open(sys.argv[2], "w", encoding="utf-8") as file:
        json.dump({"seconds": time.perf_counter() - started, "rewards": rewards}, file)


if __name__ == "__main__":
    main()
