"""Part 4: where one training step spends its time: the idle share of the device, the largest kernels, the waits."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.context import Context
from benchmarks.gpu.shapes import build_critic, draw_pairs, qwen3_config
from benchmarks.gpu.speed import MICRO_BATCH_TOKENS, PlainSteps

LARGEST = 10


def run(context: Context) -> None:
    """Profiles steps of the library's forward and backward passes on pairs of 512 + 256 tokens."""
    context.case("Qwen3-0.6B 512+256", 20, lambda: profiled(context))


def profiled(context: Context) -> dict[str, Any]:
    """Profiles one step after two others, and counts the waits for the device in one more."""
    critic = build_critic(qwen3_config("0.6B", context.tiny), context.device, torch.bfloat16)
    steps = PlainSteps(critic, MICRO_BATCH_TOKENS, context)
    pairs = draw_pairs("512+256", 4 if context.tiny else 64, context.tiny)
    for _ in range(2):
        steps.step(pairs)
    on_gpu = context.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    context.synchronize()
    with profile(activities=activities) as profiler:
        steps.step(pairs)
        context.synchronize()
    device_type = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    events = [event for event in profiler.events() if event.device_type == device_type]
    spans = sorted((event.time_range.start, event.time_range.end) for event in events)
    time_of: Counter[str] = Counter()
    for event in events:
        time_of[event.name[:80]] += event.device_time if on_gpu else event.self_cpu_time_total
    total = sum(time_of.values()) or 1.0
    return {
        "idle share of the device": 1.0 - busy(spans) / (spans[-1][1] - spans[0][0]) if on_gpu and spans else None,
        "waits for the device": waits(steps, pairs) if on_gpu else None,
        "micro-batches": steps.micro_batches,
        "largest": [[name, round(time / total, 4)] for name, time in time_of.most_common(LARGEST)],
    }


def waits(steps: PlainSteps, pairs: Any) -> int:
    """Counts the synchronisations of a step, as torch detects them."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            steps.step(pairs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(one.message) for one in caught)


def busy(spans: list[tuple[float, float]]) -> float:
    """Returns the length of the union of sorted intervals."""
    total, end = 0.0, float("-inf")
    for start, stop in spans:
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total
