"""Part 1: critics over prefix trees against plain transformers, one sequence at a time, in fp64 on the same device.

The error of plain transformers in the same dtype stands beside the critic's. A critic fails if its error is more than
twice as large and above the floor of the dtype.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from benchmarks.gpu.context import Context
from benchmarks.gpu.shapes import IntArray, build_critic, build_model, family_configs, long_tree, trees
from rlhf_critic.batching import varlen_plan

FLOORS = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
MAX_GRADIENT_TOKENS = 20_000  # of all sequences, which the reference computes in fp64


def run(context: Context) -> None:
    """Compares whole critics: rewards, values and gradients."""
    torch.backends.cuda.matmul.allow_tf32 = False
    configs = family_configs(context.tiny)
    others = ("llama",) if context.tiny else ("llama", "mistral-window")
    for dtype in (torch.bfloat16, torch.float32):
        for tree, sequences in trees(context.tiny).items():
            for family in configs if tree == "pair" else others:
                for way in ways(context) if family == "llama" else ("chosen",):
                    run_case = partial(compare, context, configs[family], sequences, dtype, way)
                    context.case(f"{family} {NAMES[dtype]} {tree} {way}", 8, run_case)
    for way in ways(context):
        context.case(f"llama bf16 long tree {way}", 15, partial(compare_long, context, configs["llama"], way))


def ways(context: Context) -> tuple[str, ...]:
    """Returns the plans of attention to force; ``chosen`` leaves the choice to the library. CPUs have no plans."""
    return ("chosen", "paths", "levels") if context.device.type == "cuda" else ("chosen",)


@contextmanager
def forced(way: str) -> Iterator[None]:
    """Makes the library use one plan of attention."""
    if way == "chosen":
        yield
        return
    before = varlen_plan.LEVELS_FROM
    varlen_plan.LEVELS_FROM = 0 if way == "levels" else 10**9
    try:
        yield
    finally:
        varlen_plan.LEVELS_FROM = before


def compare(
    context: Context, config: PreTrainedConfig, sequences: Sequence[IntArray], dtype: torch.dtype, way: str
) -> dict[str, Any]:
    """Compares rewards, values and gradients of the sum of weighted rewards and values."""
    with_gradients = sum(map(len, sequences)) <= MAX_GRADIENT_TOKENS
    expected = plain(context, config, sequences, (dtype, torch.float64), with_gradients)
    usual = plain(context, config, sequences, (dtype,), with_gradients)
    critic = build_critic(config, context.device, dtype)
    with forced(way):
        batch = critic.batch_of(list(sequences), context.device)
        found: dict[str, Tensor] = {"rewards": critic(batch, rewards_only=True).detach()}
        values_SL = critic(batch)
        found["values"] = torch.cat([row[: len(ids)] for row, ids in zip(values_SL, sequences, strict=True)])
        for name, rewards_only in (("reward gradient", True), ("value gradient", False)) if with_gradients else ():
            critic.zero_grad()
            output = critic(batch, rewards_only=rewards_only)
            rows = output if rewards_only else [row[: len(ids)] for row, ids in zip(output, sequences, strict=True)]
            objective(list(rows)).backward()
            found[name] = flat_gradient(critic)
    errors = {name: relative_error(found[name], expected[name]) for name in found}
    plain_errors = {name: relative_error(usual[name], expected[name]) for name in found}
    limit = {name: max(FLOORS[dtype], 2 * plain_errors[name]) for name in found}
    finite = all(bool(torch.isfinite(one).all()) for one in found.values())
    return {
        "ok": finite and all(errors[name] <= limit[name] for name in found),
        "tokens": sum(map(len, sequences)),
        "computed": batch.computed_tokens,
        **{f"error of {name}": errors[name] for name in found},
        **{f"plain error of {name}": plain_errors[name] for name in found},
    }


def compare_long(context: Context, config: PreTrainedConfig, way: str) -> dict[str, Any]:
    """Compares the rewards of some sequences of a long tree, and checks that all gradients are finite."""
    sequences = long_tree(context.tiny)
    critic = build_critic(config, context.device, torch.bfloat16)
    with forced(way):
        batch = critic.batch_of(list(sequences), context.device)
        rewards_S = critic(batch, rewards_only=True)
        rewards_S.sum().backward()
    some = sequences[:2]
    expected = plain(context, config, some, (torch.bfloat16, torch.float32), False)["rewards"]
    error = relative_error(rewards_S[: len(some)].detach(), expected)
    finite = bool(torch.isfinite(flat_gradient(critic)).all())
    return {"ok": finite and error <= 3 * FLOORS[torch.bfloat16], "computed": batch.computed_tokens, "error": error}


def plain(
    context: Context,
    config: PreTrainedConfig,
    sequences: Sequence[IntArray],
    dtypes: tuple[torch.dtype, ...],
    with_gradients: bool,
) -> dict[str, Tensor]:
    """Computes each sequence alone with plain transformers, with weights rounded to these dtypes in turn."""
    model = build_model(config, context.device, *dtypes)
    found: dict[str, Tensor] = {}
    kinds = (("rewards", "reward gradient"), ("values", "value gradient"))
    for name, gradient in kinds:
        model.zero_grad()
        rows: list[Tensor] = []
        for ids in sequences:
            with torch.set_grad_enabled(with_gradients):
                hidden = model.base_model(torch.as_tensor(ids, device=context.device)[None]).last_hidden_state[0]
                head = model.score.weight
                wide = torch.promote_types(hidden.dtype, torch.float32)
                row = torch.nn.functional.linear(hidden.to(wide), head.to(wide))[:, 0]
            row = row[-1:] if name == "rewards" else row
            if with_gradients:
                (objective([row], len(rows)) if name == "values" else objective(list(row), len(rows))).backward()
            rows.append(row.detach())
        found[name] = torch.cat(rows)
        if with_gradients:
            found[gradient] = flat_gradient(model)
    del model
    gc.collect()
    return found


def objective(rows: Sequence[Tensor], first: int = 0) -> Tensor:
    """Returns a sum in which every sequence has another weight, so that a swap of sequences shows."""
    return torch.stack([(1.0 + 0.1 * (first + index)) * row.mean() for index, row in enumerate(rows)]).sum()


def flat_gradient(module: torch.nn.Module) -> Tensor:
    """Returns the gradients of all parameters as one vector."""
    named = sorted(module.named_parameters(), key=lambda one: one[0].removeprefix("model."))
    return torch.cat([one.grad.detach().flatten() for _, one in named if one.grad is not None])


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Returns the norm of the difference over the norm of what is expected."""
    wide = expected.double()
    return float((found.detach().double() - wide).norm() / wide.norm())
