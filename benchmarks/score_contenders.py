"""One scoring run: this project's critic, or plain transformers in padded batches sorted by length.

Both score the same sequences with the same weights in fp32, without gradients. A few sequences warm up; then all are
scored once and timed, from token ids to rewards.
"""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from benchmarks.harness import Result, Specification, contender, matrix_product_rate
from benchmarks.workloads import PROFILES, draw_prompts, head_weight
from rlhf_critic.batching.prefix_tree import PrefixTree

WARM_UP = 8


def ours(specification: Specification, sequences: list[list[int]]) -> tuple[np.ndarray, float]:
    """Scores with `score_sequences`, as `jobs.evaluate` does."""
    from rlhf_critic.data.encoding import load_tokenizer
    from rlhf_critic.model.factory import create_critic_model
    from rlhf_critic.scoring.local import score_sequences

    critic = create_critic_model(specification["model"], load_tokenizer(specification["model"]), None).eval()
    with torch.no_grad():
        critic.model.score.weight.copy_(head_weight())
    score_sequences(critic, sequences[:WARM_UP], specification["token_budget"])
    started = time.perf_counter()
    rewards = score_sequences(critic, sequences, specification["token_budget"])
    return rewards, time.perf_counter() - started


def plain(specification: Specification, sequences: list[list[int]]) -> tuple[np.ndarray, float]:
    """Scores with `AutoModelForSequenceClassification`, longest sequences first."""
    model = AutoModelForSequenceClassification.from_pretrained(
        specification["model"], num_labels=1, dtype=torch.float32
    ).eval()
    with torch.no_grad():
        model.score.weight.copy_(head_weight())
    order = sorted(range(len(sequences)), key=lambda index: -len(sequences[index]))
    rewards = np.zeros(len(sequences), dtype=np.float32)

    @torch.inference_mode()
    def score(rows: list[int]) -> None:
        longest = max(len(sequences[row]) for row in rows)
        ids = torch.full((len(rows), longest), model.config.pad_token_id)
        mask = torch.zeros(len(rows), longest, dtype=torch.int64)
        for place, row in enumerate(rows):
            ids[place, : len(sequences[row])] = torch.as_tensor(sequences[row])
            mask[place, : len(sequences[row])] = 1
        rewards[rows] = model(input_ids=ids, attention_mask=mask).logits[:, 0].numpy()

    size = specification["batch_size"]
    score(order[-WARM_UP:])
    started = time.perf_counter()
    for start in range(0, len(order), size):
        score(order[start : start + size])
    return rewards, time.perf_counter() - started


def sequences_of(specification: Specification) -> list[list[int]]:
    """Returns random ids, or the real responses of a file, in random order, because callers do not sort."""
    if specification["file"]:
        tokenizer = AutoTokenizer.from_pretrained(specification["tokenizer"])
        with gzip.open(Path(specification["file"]), "rt", encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines][: specification["prompts"]]
        texts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": response}],
                tokenize=False,
            )
            for row in rows
            for response in row["responses"]
        ]
        sequences = [ids[:1024] for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    else:
        drawn = draw_prompts(PROFILES[specification["profile"]], specification["prompts"], specification["n"])
        sequences = [response.tolist() for responses in drawn for response in responses]
    return [sequences[index] for index in np.random.default_rng(0).permutation(len(sequences))]


def work(specification: Specification) -> Result:
    """Runs the contender and adds the common results."""
    threads = torch.get_num_threads()
    sequences = sequences_of(specification)
    rewards, seconds = {"ours": ours, "plain": plain}[specification["contender"]](specification, sequences)
    return {
        "seconds": seconds,
        "sequences_per_second": len(sequences) / seconds,
        "rewards": rewards.tolist(),
        "tokens": sum(map(len, sequences)),
        "distinct_tokens": len(PrefixTree.build(sequences)),
        "matrix_product_rate": matrix_product_rate(threads),
    }


if __name__ == "__main__":
    contender(work)
