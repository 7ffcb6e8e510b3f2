"""Part 3: speed and memory of training and scoring, against padded batches, TRL's RewardTrainer and plain transformers.

Every contender trains the same model in bf16 on the same pairs, with torch's fused AdamW on the bf16 weights. The
contender ``engine`` is this project's engine: DeepSpeed, fp32 masters. The first steps warm up; the others are timed.
"""

from __future__ import annotations

import gc
import importlib.util
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.gpu.context import Context
from benchmarks.gpu.shapes import VOCABULARY, Pairs, build_critic, build_model, draw_pairs, qwen3_config
from rlhf_critic.algorithms.preference_objective import preference_loss
from rlhf_critic.batching.planner import plan_micro_batches, plan_sequences
from rlhf_critic.batching.prefix_tree import PrefixTree
from rlhf_critic.config.train import TrainConfig
from rlhf_critic.model.backbone import forward_micro_batches
from rlhf_critic.model.critic import Critic

MICRO_BATCH_TOKENS = 16384
SCORING_TOKENS = 32768
PAIRS_PER_STEP = 64
TIMED_STEPS = 3
WARM_UP_STEPS = 2
TRL_BATCH_SIZES = (8, 16, 32)
# Dense bf16 products a second, from the vendor's data sheets.
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "B200": 2250e12}

# Size, profile, contenders, expected seconds a contender; the most important first.
RUNS = (
    ("0.6B", "512+256", ("ours", "padded", "engine", "trl"), 12),
    ("1.7B", "512+256", ("ours", "padded"), 18),
    ("0.6B", "hh", ("ours", "padded", "trl"), 8),
    ("0.6B", "1024+256", ("ours", "padded"), 12),
    ("0.6B", "tldr", ("ours", "padded"), 8),
    ("0.6B", "chat", ("ours", "padded"), 8),
    ("4B", "512+256", ("ours",), 25),
    ("1.7B", "512+256", ("engine", "trl"), 25),
)


def run(context: Context) -> None:
    """Measures training, then scoring; scoring of one prompt's responses comes before the long runs."""
    for index, (size, profile, contenders, seconds) in enumerate(RUNS[:1] if context.tiny else RUNS):
        for name in contenders:
            context.case(
                f"train {name} {size} {profile}",
                seconds,
                partial(train, context, name, size, profile),
            )
        if index == 0:
            for responses in (8, 1, 64):
                context.case(f"score n={responses}", 10, partial(score, context, responses))


class PlainSteps:
    """Steps of a critic with the library's planner, batches and loss, and torch's AdamW, without DeepSpeed."""

    def __init__(self, critic: Critic, token_budget: int, context: Context) -> None:
        self.critic, self._budget, self._context = critic.train(), token_budget, context
        self.micro_batches = self.computed_tokens = 0
        fused = context.device.type == "cuda"
        self._optimizer = torch.optim.AdamW(critic.parameters(), lr=1e-5, fused=fused)
        self._options = TrainConfig()

    def step(self, pairs: Pairs) -> None:
        """Takes one step."""
        (plan,) = plan_micro_batches(pairs.units, 1, self._budget, self.critic.prefix_tree)
        self.micro_batches, self.computed_tokens = len(plan), 0
        for micro_batch in plan:
            units = [pairs.units[unit] for unit in micro_batch.units]
            batch = self.critic.batch_of([ids for unit in units for ids in unit], self._context.device)
            self.computed_tokens += batch.computed_tokens
            output = self.critic(batch, rewards_only=True)
            loss = preference_loss(output, units, np.zeros(len(units), np.float32), self._options)
            (loss.loss_P.sum() / len(pairs.units)).backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)


def train(context: Context, name: str, size: str, profile: str) -> dict[str, Any]:
    """Measures one contender."""
    pairs = draw_pairs(profile, 4 if context.tiny else PAIRS_PER_STEP, context.tiny)
    budget = MICRO_BATCH_TOKENS // (2 if size == "4B" else 1)
    context.start_peak()
    contenders: dict[str, Callable[[], dict[str, Any]]] = {
        "ours": lambda: ours(context, size, pairs, budget, prefix_tree=True),
        "padded": lambda: ours(context, size, pairs, budget, prefix_tree=False),
        "engine": lambda: engine(context, size, pairs, budget),
        "trl": lambda: trl(context, size, pairs),
    }
    found = contenders[name]()
    gc.collect()
    if "skipped" in found:
        return found
    tree_tokens = sum(len(PrefixTree.build(unit)) for unit in pairs.units)
    rate = len(pairs.units) / found["step_seconds"]
    card = torch.cuda.get_device_name() if context.device.type == "cuda" else ""
    peak_rate = next((peak for name, peak in PEAKS.items() if name in card), None)
    parameters = found.pop("parameters")
    return {
        "pairs/s": rate,
        "tokens/s": pairs.tokens / found["step_seconds"],
        # Of the tokens that must be computed, and without attention: no contender gains by computing more.
        "mfu": 6 * parameters * tree_tokens / found["step_seconds"] / peak_rate if peak_rate else None,
        "tokens per distinct token": pairs.tokens / tree_tokens,
        "peak bytes": context.peak_bytes(),
        **found,
    }


def timed(context: Context, step: Callable[[], Any]) -> float:
    """Returns the median seconds of a step."""
    times = []
    for index in range(2 if context.tiny else WARM_UP_STEPS + TIMED_STEPS):
        context.synchronize()
        started = time.perf_counter()
        step()
        context.synchronize()
        if index >= (1 if context.tiny else WARM_UP_STEPS):
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def body_parameters(model: nn.Module) -> int:
    """Returns the number of parameters outside the embedding."""
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    return sum(one.numel() for one in model.parameters()) - sum(one.numel() for one in embedding.parameters())


def ours(context: Context, size: str, pairs: Pairs, budget: int, prefix_tree: bool) -> dict[str, Any]:
    """The library's critic, over prefix trees or padded rows."""
    critic = build_critic(qwen3_config(size, context.tiny), context.device, torch.bfloat16, prefix_tree)
    steps = PlainSteps(critic, budget, context)
    seconds = timed(context, lambda: steps.step(pairs))
    return {
        "step_seconds": seconds,
        "computed tokens": steps.computed_tokens,
        "micro-batches": steps.micro_batches,
        "parameters": body_parameters(critic.model),
    }


def engine(context: Context, size: str, pairs: Pairs, budget: int) -> dict[str, Any]:
    """This project's engine: DeepSpeed, ZeRO-1, fp32 masters."""
    from benchmarks.gpu.engine_steps import loss_step, start

    if reason := start(context):
        return {"skipped": reason}
    from rlhf_critic.config.model import ModelConfig
    from rlhf_critic.training.critic_engine import CriticEngine

    critic = build_critic(qwen3_config(size, context.tiny), context.device, torch.bfloat16)
    parameters = body_parameters(critic.model)
    options = TrainConfig(zero_stage=1, learning_rate=1e-5, token_budget=budget)
    trained = CriticEngine(critic, ModelConfig(dtype="bfloat16"), options, total_steps=100)
    seconds = timed(context, lambda: loss_step(trained, pairs))
    return {"step_seconds": seconds, "parameters": parameters}


def trl(context: Context, size: str, pairs: Pairs) -> dict[str, Any]:
    """TRL's RewardTrainer at its best batch size: bf16 weights, SDPA, grouped by length."""
    if importlib.util.find_spec("trl") is None:
        return {"skipped": "trl is not installed"}
    tried: dict[int, float] = {}
    for batch_size in (2,) if context.tiny else TRL_BATCH_SIZES:
        try:
            tried[batch_size] = trl_seconds(context, size, pairs, batch_size)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            break
    best = min(tried, key=tried.__getitem__)
    model = build_model(qwen3_config(size, context.tiny), torch.device("meta"), torch.bfloat16)
    return {
        "step_seconds": tried[best],
        "batch size": best,
        "parameters": body_parameters(model),
        "seconds by batch size": {str(key): round(value, 4) for key, value in tried.items()},
    }


def trl_seconds(context: Context, size: str, pairs: Pairs, batch_size: int) -> float:
    """Returns the median seconds of a step of TRL's RewardTrainer."""
    import datasets
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import RewardConfig, RewardTrainer

    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: object, **__: object) -> None:
            context.synchronize()
            ends.append(time.perf_counter())

    words = Tokenizer(models.WordLevel({f"<{index}>": index for index in range(VOCABULARY)}, unk_token="<0>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<0>", eos_token="<2>", pad_token="<0>")
    rows = [
        {"chosen_ids": chosen.tolist(), "rejected_ids": rejected.tolist(), "length": max(len(chosen), len(rejected))}
        for chosen, rejected in pairs.units
    ]
    steps = 2 if context.tiny else WARM_UP_STEPS + TIMED_STEPS
    with tempfile.TemporaryDirectory() as output:
        options = RewardConfig(
            output_dir=output,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=math.ceil(len(rows) / batch_size),
            max_steps=steps,
            learning_rate=1e-5,
            gradient_checkpointing=False,
            bf16=True,
            use_cpu=context.device.type == "cpu",
            train_sampling_strategy="group_by_length",
            length_column_name="length",
            remove_unused_columns=False,
            max_length=None,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            optim="adamw_torch_fused" if context.device.type == "cuda" else "adamw_torch",
        )
        trainer = RewardTrainer(
            model=build_model(qwen3_config(size, context.tiny), context.device, torch.bfloat16),
            args=options,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[Clock()],
        )
        trainer.train()
    return statistics.median(np.diff(ends).tolist()[-TIMED_STEPS:])


@torch.no_grad()
def score(context: Context, responses: int) -> dict[str, Any]:
    """Scores responses to the prompts of tldr by the critic and by plain transformers in padded batches."""
    prompts = 2 if context.tiny else max(8, 512 // responses)
    units = draw_pairs("tldr", prompts, context.tiny, responses).units
    sequences = [ids for unit in units for ids in unit]
    critic = build_critic(qwen3_config("0.6B", context.tiny), context.device, torch.bfloat16).eval()

    def by_critic() -> np.ndarray:
        (plan,) = plan_sequences(sequences, 1, SCORING_TOKENS, critic.prefix_tree)
        rewards = torch.zeros(len(sequences))
        outputs = forward_micro_batches(
            critic, sequences, plan, lambda batch, _: critic(batch, rewards_only=True), context.device
        )
        for rows, rewards_U, _ in outputs:
            rewards[list(rows)] = rewards_U.cpu()
        return rewards.numpy()

    found = by_critic()
    seconds = timed(context, by_critic)
    critic.to("meta")  # frees its memory
    model = build_model(qwen3_config("0.6B", context.tiny), context.device, torch.bfloat16).eval()
    order = sorted(range(len(sequences)), key=lambda row: -len(sequences[row]))

    def by_transformers(size: int) -> np.ndarray:
        rewards = np.zeros(len(sequences), np.float32)
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            longest = max(len(sequences[row]) for row in rows)
            ids = torch.zeros(len(rows), longest, dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for place, row in enumerate(rows):
                ids[place, : len(sequences[row])] = torch.from_numpy(sequences[row])
                mask[place, : len(sequences[row])] = 1
            logits = model(input_ids=ids.to(context.device), attention_mask=mask.to(context.device)).logits
            rewards[rows] = logits[:, 0].float().cpu().numpy()
        return rewards

    expected, plain_seconds = by_transformers(8), {}
    for size in (2,) if context.tiny else (16, 64, 128):
        plain_seconds[size] = timed(context, partial(by_transformers, size))
    best = min(plain_seconds, key=plain_seconds.__getitem__)
    spread = float(expected.std()) or 1.0
    return {
        "sequences/s": len(sequences) / seconds,
        "plain sequences/s": len(sequences) / plain_seconds[best],
        "plain batch size": best,
        "ratio": plain_seconds[best] / seconds,
        "mean difference over deviation": float(np.abs(found - expected).mean()) / spread,
        "ok": bool(np.isfinite(found).all()) and float(np.abs(found - expected).mean()) <= 0.05 * spread,
    }
