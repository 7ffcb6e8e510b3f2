"""Part 2: a DeepSpeed engine on one rank in bf16 at every ZeRO stage, against a plain loop with fp32 masters.

Twenty steps, saving and resuming, values, an update of values, offloading. DeepSpeed's memory stands beside what
`rlhf_critic.training.memory_estimate` calculates.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import tempfile
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.gpu.context import Context
from benchmarks.gpu.shapes import Pairs, build_critic, build_model, draw_pairs, family_configs
from rlhf_critic.config.deepspeed import Hardware
from rlhf_critic.config.model import ModelConfig
from rlhf_critic.config.train import TrainConfig
from rlhf_critic.training.memory_estimate import activation_bytes, count_model, shard_memory

STEPS = 20
TINY_STAGES = (0, 2)
PAIRS = 16
LOSS_TOLERANCE = 0.03  # mean relative difference of the losses of 20 steps in bf16
OPTIONS: dict[str, Any] = {
    "learning_rate": 1e-3,
    "schedule": "constant",
    "warmup_fraction": 0.0,
    "weight_decay": 0.01,
    "token_budget": 8192,
}


def run(context: Context) -> None:
    """Runs every stage."""
    if reason := start(context):
        context.record("engine", skipped=reason)
        return
    expected = plain_losses(context)
    for stage in TINY_STAGES if context.tiny else (1, 0, 2, 3):
        context.case(f"bf16 stage {stage}", 20, partial(steps, context, stage, expected))


def start(context: Context) -> str:
    """Initialises a group of one rank; returns why it cannot."""
    if importlib.util.find_spec("deepspeed") is None:
        return "deepspeed is not installed"
    os.environ.update(LOCAL_RANK="0", RANK="0", WORLD_SIZE="1")
    if context.device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    from rlhf_critic.training.process_group import init_distributed

    backend = "nccl" if context.device.type == "cuda" else "gloo"
    if not dist.is_initialized():
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    init_distributed(backend)
    return ""


def pairs_of(context: Context) -> Pairs:
    """Returns the pairs of every step."""
    drawn = draw_pairs("hh", PAIRS if not context.tiny else 4, context.tiny)
    return Pairs([[ids % 1000 + 3 for ids in unit] for unit in drawn.units])


def make_engine(context: Context, stage: int) -> Any:
    """Builds an engine around a critic with random weights."""
    from rlhf_critic.training.critic_engine import CriticEngine

    critic = build_critic(family_configs(context.tiny)["llama"], context.device, torch.bfloat16)
    options = TrainConfig(zero_stage=stage, **OPTIONS)
    return CriticEngine(critic, ModelConfig(dtype="bfloat16"), options, total_steps=STEPS)


def loss_step(engine: Any, pairs: Pairs) -> Any:
    """Takes one step on the mean Bradley-Terry loss of the pairs."""
    from rlhf_critic.algorithms.preference_objective import preference_loss
    from rlhf_critic.training.engine import MicroBatchLoss

    def loss_of(batch: Any, units: Any) -> MicroBatchLoss:
        output = engine._engine(batch, rewards_only=True)
        chosen = [pairs.units[unit] for unit in units]
        result = preference_loss(output, chosen, np.zeros(len(chosen), np.float32), engine.options)
        return MicroBatchLoss(result.loss_P, result.sums())

    prepared = engine.training.prepare(pairs.units)
    result, _ = engine.training.take_step(
        prepared, loss_of, denominator=len(pairs.units), tokens=pairs.tokens, seed=0, name_of=str
    )
    return result


def steps(context: Context, stage: int, expected: list[float]) -> dict[str, Any]:
    """Trains, saves, resumes, computes values, updates and offloads at one stage."""
    engine, pairs = make_engine(context, stage), pairs_of(context)
    context.start_peak()
    losses = [loss_step(engine, pairs).loss for _ in range(STEPS)]
    peak = context.peak_bytes()
    differences = [abs(a - b) / max(abs(b), 1e-3) for a, b in zip(losses, expected, strict=True)]
    sequences = [unit[0] for unit in pairs.units[:3]]
    with torch.no_grad():
        values, rewards = engine.values(sequences), engine.rewards(sequences)
    end_difference = max(abs(float(row[-1]) - float(reward)) for row, reward in zip(values, rewards, strict=True))
    with tempfile.TemporaryDirectory() as directory:
        engine.training.save_state(directory)
        following = loss_step(engine, pairs).loss
        other = make_engine(context, stage)
        other.training.load_state(directory)
    resumed = loss_step(other, pairs).loss
    del other
    collect(context)
    allocated = torch.cuda.memory_allocated() if context.device.type == "cuda" else 0
    before = engine.rewards(sequences)
    offloaded = engine.training.offload()
    collect(context)
    freed = allocated - torch.cuda.memory_allocated() if context.device.type == "cuda" else offloaded.bytes
    offloaded.restore()
    same_after_offload = bool(np.array_equal(before, engine.rewards(sequences)))
    lengths = [len(ids) - 2 for ids in sequences]
    targets = [np.ones(length, np.float32) for length in lengths]
    olds = [np.zeros(length, np.float32) for length in lengths]
    updated = engine.update(sequences, [2] * len(sequences), targets, olds, None)
    mean_difference = float(np.mean(differences))
    return {
        "ok": mean_difference <= LOSS_TOLERANCE and abs(following - resumed) <= 0.05 and same_after_offload,
        "first loss": losses[0],
        "last loss": losses[-1],
        "mean difference of losses": mean_difference,
        "largest difference of losses": max(differences),
        "loss after resuming, difference": abs(following - resumed),
        "value at the end, difference to reward": end_difference,
        "update loss": updated.loss,
        "bytes freed by offloading": int(freed),
        "peak bytes": peak,
        "calculated peak bytes": calculated_peak(context, stage),
    }


def calculated_peak(context: Context, stage: int) -> int:
    """Returns the peak that `jobs.plan` would calculate for this engine."""
    config = family_configs(context.tiny)["llama"]
    critic = build_critic(config, torch.device("meta"), torch.bfloat16)
    pairs = pairs_of(context)
    tokens = min(OPTIONS["token_budget"], pairs.tokens)
    longest = max(len(ids) for unit in pairs.units for ids in unit)
    activations = activation_bytes(critic, int(tokens), longest, gradient_checkpointing=False)
    options = TrainConfig(zero_stage=stage, **OPTIONS)
    hardware = Hardware(on_gpu=context.device.type == "cuda")
    return shard_memory(count_model(critic), ModelConfig(dtype="bfloat16"), options, hardware, activations).peak


def plain_losses(context: Context) -> list[float]:
    """Returns the losses of a loop without an engine: one pair at a time, gradients and masters in fp32."""
    model = build_model(family_configs(context.tiny)["llama"], context.device, torch.bfloat16)
    pairs = pairs_of(context)
    parameters = list(model.parameters())
    masters = [nn.Parameter(parameter.detach().float()) for parameter in parameters]
    groups = [
        {"params": [one for one in masters if one.dim() > 1], "weight_decay": OPTIONS["weight_decay"]},
        {"params": [one for one in masters if one.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=float(OPTIONS["learning_rate"]), betas=(0.9, 0.95))

    def reward(ids: np.ndarray) -> Tensor:
        hidden = model.base_model(torch.as_tensor(ids, device=context.device)[None]).last_hidden_state[0, -1]
        return nn.functional.linear(hidden.float(), model.score.weight.float())[0]

    losses = []
    for _ in range(STEPS):
        total = 0.0
        for master in masters:
            master.grad = torch.zeros_like(master)
        for chosen, rejected in pairs.units:
            loss = -nn.functional.logsigmoid(reward(chosen) - reward(rejected)) / len(pairs.units)
            loss.backward()
            total += float(loss)
            for parameter, master in zip(parameters, masters, strict=True):
                if parameter.grad is not None and master.grad is not None:
                    master.grad += parameter.grad.float()
                    parameter.grad = None
        nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        with torch.no_grad():
            for parameter, master in zip(parameters, masters, strict=True):
                parameter.copy_(master)
        losses.append(total)
    return losses


def collect(context: Context) -> None:
    """Frees what nobody refers to."""
    gc.collect()
    if context.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
