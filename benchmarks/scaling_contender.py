"""One rank of a training run with one thread: its pairs per second and the size of its state."""

from __future__ import annotations

import gc
import os
import statistics
import time
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.harness import Result, Specification, contender
from benchmarks.train_contenders import build_engine, pairs_of, table_of
from rlhf_critic.training.critic_engine import CriticEngine


def work(specification: Specification) -> Result:
    """Joins the other ranks, trains and reports."""
    rank, world_size = specification["rank"], specification["world_size"]
    os.environ["LOCAL_RANK"] = str(rank)  # DeepSpeed requires it
    dist.init_process_group(
        "gloo",
        init_method=f"file://{specification['store']}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(minutes=5),
    )
    engine = build_engine(specification)
    held = state_bytes_at_each_step(engine)
    pairs, size = pairs_of(specification), specification["pairs_per_step"]
    preferences = table_of(pairs)
    times, tokens = [], 0
    for start in range(0, len(pairs) - size + 1, size):
        started = time.perf_counter()
        metrics = engine.train_step(preferences, np.arange(start, start + size))
        times.append(time.perf_counter() - started)
        tokens = metrics.computed_tokens
    dist.barrier()
    return {
        "pairs_per_second": size / statistics.median(times[1:]),
        "state_bytes": max(held[1:]),
        "computed_tokens": tokens,
    }


def state_bytes_at_each_step(engine: CriticEngine) -> list[int]:
    """Returns the bytes of parameters, gradients and optimizer state on this rank at the optimizer step.

    At that moment no activation is alive, so all live tensors are counted, each storage once.
    """
    held: list[int] = []

    def count(*_: object) -> None:
        storages = {}
        for tensor in filter(torch.is_tensor, gc.get_objects()):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        held.append(sum(storages.values()))

    optimizer = engine._engine.optimizer  # our optimizer at stage 0, else DeepSpeed's wrapper around it
    getattr(optimizer, "optimizer", optimizer).register_step_pre_hook(count)
    return held


if __name__ == "__main__":
    contender(work)
