"""One part of the growth benchmark in a process: writes synthetic preferences, encodes them, or loads and uses them."""

from __future__ import annotations

import json
import re
import resource
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from benchmarks.harness import Result, Specification, contender
from benchmarks.workloads import FIRST_ORDINARY_ID, VOCABULARY, save_tokenizer, text_of
from rlhf_critic.batching.planner import plan_micro_batches
from rlhf_critic.batching.sampler import DataOrder
from rlhf_critic.data.encoding import Encoder, load_tokenizer
from rlhf_critic.data.preference_dataset import EncodedPreferences
from rlhf_critic.data.preferences import load_preferences
from rlhf_critic.evaluation.preferences import evaluate_rewards

BLOCK = 1000  # rows that are made at a time
STEPS = 20
TOKEN_BUDGET = 8192
PROMPTS_PER_ROW = 0.5  # so that prompts repeat

T = TypeVar("T")


def work(specification: Specification) -> Result:
    """Writes and encodes synthetic preferences, or loads and uses them."""
    folder = Path(specification["folder"])
    if specification["part"] == "encode":
        write_rows(folder / "rows.jsonl", specification["rows"], specification["tokens"])
        save_tokenizer(folder)
        seconds, table = timed(lambda: load(folder))
        peaks = [resource.getrusage(of).ru_maxrss * 1024 for of in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        tokens = int(table.tokens_N.sum())
        return {"encode_s": seconds, "encode_peak_bytes": max(peaks), "tokens": tokens}
    return use(folder, specification)


def use(folder: Path, specification: Specification) -> Result:
    """Loads the encoded table, takes steps and evaluates random rewards."""
    encoder = encoder_of(folder)
    before = private_bytes()
    load_s, table = timed(lambda: load(folder, encoder))
    load_bytes = private_bytes() - before
    order = DataOrder(table.prompts_N, 0)
    batch = specification["batch"]
    epoch_s, _ = timed(lambda: order.rows_of_step(batch, 0))
    order_s, plan_s = [], []
    for step in range(1, STEPS + 1):
        seconds, rows_G = timed(partial(order.rows_of_step, batch, step))
        order_s.append(seconds)
        plan_s.append(timed(partial(plan, table, rows_G, specification["ranks"]))[0])
    rng = np.random.default_rng(0)
    pairs = table.comparisons()
    rewards_P2 = np.add(rng.normal(size=pairs.lengths_P2.shape), [0.5, 0.0])
    statistics_s, _ = timed(
        lambda: evaluate_rewards(rewards_P2[:, 0], rewards_P2[:, 1], pairs.lengths_P2, pairs.subsets_P, pairs.rows_P)
    )
    return {
        "load_s": load_s,
        "load_bytes": load_bytes,
        "epoch_s": epoch_s,
        "step_order_s": float(np.median(order_s)),
        "step_plan_s": float(np.median(plan_s)),
        "statistics_s": statistics_s,
    }


def plan(table: EncodedPreferences, rows_G: np.ndarray, ranks: int) -> None:
    """Reads and plans a global batch."""
    plan_micro_batches([one.responses for one in table.take(rows_G)], ranks, TOKEN_BUDGET, prefix_tree=True)


def write_rows(path: Path, rows: int, tokens: int) -> None:
    """Writes synthetic preferences, a block at a time. Three quarters of the tokens are the prompt."""
    rng = np.random.default_rng(0)
    words = np.array([text_of(np.array([token])) for token in range(VOCABULARY)])

    def texts(length: float) -> list[str]:
        lengths = rng.poisson(length, BLOCK) + 1
        drawn = words[rng.integers(FIRST_ORDINARY_ID, VOCABULARY, int(lengths.sum()))]
        return [" ".join(part) for part in np.split(drawn, lengths.cumsum()[:-1])]

    with path.open("w") as file:
        for start in range(0, rows, BLOCK):
            fresh = texts(0.75 * tokens)
            prompts = [fresh[int(place * PROMPTS_PER_ROW)] for place in range(BLOCK)]
            sides = (prompts, texts(0.25 * tokens), texts(0.25 * tokens))
            for row, (prompt, chosen, rejected) in enumerate(zip(*sides, strict=True), start=start):
                if row < rows:
                    fields = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "subset": f"subset {row % 20}"}
                    file.write(json.dumps(fields) + "\n")


def encoder_of(folder: Path) -> Encoder:
    """Returns the encoder of the benchmark's tokenizer."""
    return Encoder(load_tokenizer(str(folder), chat_template="plain"), 1024)


def load(folder: Path, encoder: Encoder | None = None) -> EncodedPreferences:
    """Encodes the rows, or maps the cached encoding."""
    return load_preferences(str(folder / "rows.jsonl"), encoder or encoder_of(folder), str(folder / "cache"))


def timed(action: Callable[[], T]) -> tuple[float, T]:
    """Returns the seconds that an action takes, and its result."""
    started = time.perf_counter()
    result = action()
    return time.perf_counter() - started, result


def private_bytes() -> int:
    """Returns the memory of this process that no other shares: neither mapped files nor libraries."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


if __name__ == "__main__":
    contender(work)
