"""Training engine: a model, its optimizer and its schedule, sharded by DeepSpeed over the ranks.

`rlhf_critic.training.critic_engine.CriticEngine` and `rlhf_critic.training.policy_engine.PolicyEngine` are built on it.
Every method is collective: all ranks call it with the same arguments, in the same order, and get the same result.
Knows nothing about what is trained: the caller computes the loss of a micro-batch.

Shape legend: U units (preferences, rollouts) of a micro-batch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from transformers import get_scheduler

from rlhf_critic.batching.device_copy import HostCopy, is_gpu
from rlhf_critic.batching.planner import MicroBatch, plan_micro_batches
from rlhf_critic.batching.prefix_tree import TokenIds
from rlhf_critic.checkpoint.critic_directory import RESUME_FOLDER
from rlhf_critic.config.deepspeed import deepspeed_config
from rlhf_critic.config.model import BodyConfig, OptimizerConfig
from rlhf_critic.errors import CheckpointError, NonFiniteLossError
from rlhf_critic.files import write_text_atomically
from rlhf_critic.model.backbone import Backbone, Batch
from rlhf_critic.model.device import configure_device
from rlhf_critic.model.weights import full_shape
from rlhf_critic.training.offload import Offloaded
from rlhf_critic.training.optimizer import create_optimizer
from rlhf_critic.training.process_group import hardware_of_ranks
from rlhf_critic.training.reshard import load_resized, plain_path
from rlhf_critic.training.token_budget import (
    MAX_GPU_TOKENS,
    ActivationMeter,
    CudaMemory,
    measure_on_device,
    probe_token_budget,
)

ENGINE_STATE_NAME = "engine.json"
STATE_TAG = "state"
PROBE_LENGTH = 128  # tokens of each sequence in the probe of the token budget


@dataclass(frozen=True, eq=False)
class MicroBatchLoss:
    """Loss of a micro-batch.

    Attributes:
        loss_U: The loss of each unit, fp32, with its gradient.
        sums: Numbers to add up over the global batch, float64 ``[any]``, the same number in every micro-batch.
    """

    loss_U: Tensor
    sums: Tensor


@dataclass(frozen=True, eq=False)
class PreparedStep:
    """This rank's part of a global batch, ready to be computed.

    Attributes:
        micro_batches: The micro-batches.
        batches: The batch of each micro-batch, on the device.
    """

    micro_batches: list[MicroBatch]
    batches: list[Batch]


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Result of one optimizer step, over all ranks.

    Attributes:
        step: Steps done, this one included.
        loss: Loss of the global batch, before the step.
        grad_norm: Global gradient norm before clipping.
        learning_rate: Learning rate of the step.
        tokens: Tokens of all sequences of the global batch.
        computed_tokens: Tokens computed for them. A shared prefix counts once; padding and dummy batches count.
        micro_batches: Micro-batches per rank.
    """

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    computed_tokens: int
    micro_batches: int


class TrainingEngine:
    """A model in training on the ranks of ``torch.distributed``.

    Args:
        module: A model built with the ``deepspeed_config`` of the same options. Under ZeRO-3 it is already partitioned.
        model: Options of the model.
        options: Options of the optimizer.
        total_steps: Optimizer steps of the whole run, at which the schedule ends.
        probe: Computes a scalar from a forward pass over a batch, as a training step would, to measure token budgets.
        longest: Maximum length of a sequence in tokens, at which a probe on a GPU measures.

    Attributes:
        engine: DeepSpeed's engine around the model.
        step: Optimizer steps done.
        device: Device of the inputs.
    """

    def __init__(
        self,
        module: Backbone,
        model: BodyConfig,
        options: OptimizerConfig,
        total_steps: int,
        probe: Callable[[Any, Batch], Tensor],
        longest: int = PROBE_LENGTH,
    ) -> None:
        import deepspeed

        self.module = module
        self.options = options
        self.step = 0
        self._probe = probe
        self._longest = longest
        self._embedding_gradient: EmbeddingGradient | None = None
        hardware = hardware_of_ranks()
        model = model.resolved(hardware.on_gpu)
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        if options.gradient_checkpointing:
            module.gradient_checkpointing_enable()
        optimizer = create_optimizer(module, options)
        count = sum(full_shape(parameter).numel() for parameter in trained)
        self.engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            lr_scheduler=lambda wrapped: _schedule(wrapped, options, total_steps),
            config=deepspeed_config(model, options, hardware, count),
        )
        if options.zero_stage == 0 and model.dtype == "bfloat16":
            _undo_first_step(self.engine.optimizer)
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self.device = self.engine.device
        configure_device(self.device, trained[0].dtype)
        if self.world_size == 1 and options.zero_stage == 0:
            # DeepSpeed would flatten all gradients, reduce them over one rank and copy them back.
            self.engine.enable_backward_allreduce = False
            if model.dtype == "float32":
                embedding = module.model.get_input_embeddings()
                # If the output layer shares this weight, the gradient is dense anyway.
                tied = getattr(module.model.get_output_embeddings(), "weight", None) is embedding.weight
                if isinstance(embedding, nn.Embedding) and embedding.weight.requires_grad and not tied:
                    self._embedding_gradient = EmbeddingGradient(embedding)

    @cached_property
    def token_budget(self) -> int:
        """Maximum number of tokens of a micro-batch, as configured or measured by a probe at first use."""
        if self.options.token_budget != "auto":
            return self.options.token_budget
        if self.device.type == "cuda":
            return self._probe_gpu()
        return probe_token_budget(self._measure_micro_batch, self.free_memory())

    def free_memory(self) -> int:
        """Returns the bytes that each rank can still allocate on its device: those of the rank with the least."""
        from deepspeed.accelerator import get_accelerator

        if self.device.type == "cuda":
            free_bytes = CudaMemory().free()
        else:  # ranks of a node share its memory
            sharing = int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size))
            free_bytes = get_accelerator().available_memory() // sharing
        return int(self._agree(free_bytes, dist.ReduceOp.MIN))

    def prepare(self, units: Sequence[Sequence[TokenIds]]) -> PreparedStep:
        """Plans a global batch and copies this rank's micro-batches to the device.

        It does not communicate once `token_budget` is known. Another thread may then call it for the next step, while
        the device computes this one.

        Args:
            units: The sequences of each unit of the global batch, the same on every rank.

        Raises:
            ValueError: There is no unit, or a sequence is empty.
        """
        plan = plan_micro_batches(units, self.world_size, self.token_budget, self.module.prefix_tree)[self.rank]
        # Every thread has a current GPU of its own, at first the first one of the node.
        with torch.cuda.device(self.device) if is_gpu(self.device) else nullcontext():
            batches = [
                self.module.batch_of([ids for unit in micro_batch.units for ids in units[unit]], self.device)
                for micro_batch in plan
            ]
        return PreparedStep(plan, batches)

    def take_step(
        self,
        prepared: PreparedStep,
        loss_of: Callable[[Batch, Sequence[int]], MicroBatchLoss],
        denominator: float,
        tokens: int,
        seed: int,
        name_of: Callable[[int], str],
    ) -> tuple[StepResult, list[float]]:
        """Takes one optimizer step on a global batch. Its loss is the sum over the units divided by ``denominator``.

        Args:
            prepared: The global batch, as `prepare` returns it.
            loss_of: Runs `engine` on a batch and returns the loss of each unit. It gets the batch and the numbers of
                its units; the batch holds their sequences, unit by unit.
            denominator: Divisor of the loss. The number of units gives the mean over the units.
            tokens: Tokens of the global batch, for the result.
            seed: Random seed of dropout, combined with step and rank.
            name_of: Returns the name of a unit for an error message.

        Returns:
            The result, and the sums of `MicroBatchLoss.sums` over the global batch.

        Raises:
            NonFiniteLossError: The loss is NaN or infinite (the step was not taken), or the gradient is.
        """
        # The dropout seed depends on (seed, step, rank) alone, so a repeated step has the same dropout.
        torch.manual_seed(int(np.random.SeedSequence([seed, self.step, self.rank]).generate_state(1)[0]))
        learning_rate = float(self.engine.get_lr()[0])
        self.engine.train()
        totals: Tensor | None = None
        losses: list[tuple[tuple[int, ...], Tensor]] = []
        last = len(prepared.batches) - 1
        for index, (micro_batch, batch) in enumerate(zip(prepared.micro_batches, prepared.batches, strict=True)):
            self.engine.set_gradient_accumulation_boundary(index == last)
            result = loss_of(batch, micro_batch.units)
            losses.append((micro_batch.units, result.loss_U.detach()))
            parts = torch.cat([result.loss_U.detach().sum()[None].double(), result.sums])
            parts = parts if micro_batch.weight else torch.zeros_like(parts)
            parts = torch.cat([parts, parts.new_full((1,), batch.computed_tokens)])
            totals = parts if totals is None else totals + parts
            if index == last:
                dist.all_reduce(totals)
                copied = HostCopy(totals)
            # DeepSpeed averages gradients over ranks; the factor world_size turns that mean into the sum.
            self.engine.backward(result.loss_U.sum() * (micro_batch.weight * self.world_size / denominator))
            if self._embedding_gradient:
                self._embedding_gradient.collect(index == last)
            if index == last:
                # The device still has the last backward pass to do while the host waits here.
                loss_sum, *sums, computed_tokens = copied.read()
                self._check_finite(loss_sum, losses, name_of)
                if self.options.zero_stage == 0:
                    # Gradients are complete on every rank, and DeepSpeed neither keeps nor checks their norm.
                    gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
                    grad_norm = float(get_total_norm(gradients))
                    self._check_finite(grad_norm, losses, name_of)
            self.engine.step()
        if self.options.zero_stage > 0:
            grad_norm = float(self.engine.get_global_grad_norm())
            self._check_finite(grad_norm, losses, name_of)
        self.step += 1
        return StepResult(
            step=self.step,
            loss=loss_sum / denominator,
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            tokens=tokens,
            computed_tokens=int(computed_tokens),
            micro_batches=len(prepared.batches),
        ), sums

    def offload(self) -> Offloaded:
        """Moves parameters, gradients and optimizer state off this rank's device; see `Offloaded`."""
        return Offloaded(self.engine, [self._embedding_gradient.dense] if self._embedding_gradient else [])

    def save_state(self, directory: str | Path) -> None:
        """Writes the state that a resumed run needs to ``DIRECTORY/resume``.

        Each file is written by one rank, on its node.
        """
        resume = Path(directory) / RESUME_FOLDER
        (resume / STATE_TAG).mkdir(parents=True, exist_ok=True)
        self.engine.save_checkpoint(str(resume), tag=STATE_TAG)
        state = {
            "step": self.step,
            "world_size": self.world_size,
            "zero_stage": self.options.zero_stage,
            "token_budget": self.token_budget,  # on all ranks, because the first access may run a collective probe
        }
        if self.rank == 0:
            write_text_atomically(resume / ENGINE_STATE_NAME, json.dumps(state))
        dist.barrier()

    def load_state(self, directory: str | Path) -> None:
        """Loads what `save_state` wrote: weights, optimizer, schedule, step and token budget.

        The number of ranks may differ from the number that saved it. DeepSpeed unpickles this state, so load only
        what this project wrote.

        Raises:
            CheckpointError: The state is missing, was saved with another ZeRO stage, or cannot be converted to
                another world size.
        """
        resume = Path(directory) / RESUME_FOLDER
        try:
            state = json.loads((resume / ENGINE_STATE_NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{directory}: no state to resume from: {error}") from error
        stage, world_size = state["zero_stage"], state["world_size"]
        if stage != self.options.zero_stage:
            raise CheckpointError(
                f"{directory}: saved with zero_stage={stage}, now {self.options.zero_stage}; resume with the same stage"
            )
        # At stage 0 nothing is sharded, so every rank reads the complete state.
        if world_size == self.world_size or stage == 0:
            with plain_path(resume) as plain:
                self.engine.load_checkpoint(str(plain), tag=STATE_TAG)
        elif state["step"] == 0:
            raise CheckpointError(
                f"{directory}: saved with world_size={world_size}, now {self.world_size}, before the first step, so "
                "there are no moments to convert; resume with the same world size, or start a new run from it"
            )
        else:
            load_resized(self.engine, resume / STATE_TAG, world_size)
        self.step = int(state["step"])
        if self.options.token_budget == "auto":
            # A new probe might choose another budget, which changes the order of summation.
            self.token_budget = int(state["token_budget"])

    def _measure_micro_batch(self, tokens: int) -> tuple[float, int]:
        """Measures a micro-batch of weight zero, which changes no gradient; returns the maxima over the ranks."""
        from deepspeed.accelerator import get_accelerator

        batch = self._probe_batch(tokens, PROBE_LENGTH)
        meter = ActivationMeter()
        self.engine.train()
        self.engine.set_gradient_accumulation_boundary(False)
        with torch.enable_grad(), meter.running(self.module.parameters(), get_accelerator().synchronize):
            self.engine.backward(self._probe(self.engine, batch) * 0.0)
            self.engine.step()
        if self._embedding_gradient:
            self._embedding_gradient.collect(is_last=False)
        return self._agree(meter.seconds, dist.ReduceOp.MAX), int(self._agree(meter.bytes, dist.ReduceOp.MAX))

    def _probe_gpu(self) -> int:
        """Measures token budgets on GPUs by the memory that the allocator gives out."""
        memory = CudaMemory()
        trained = sum(full_shape(one).numel() for one in self.module.parameters() if one.requires_grad)
        # AdamW's moments and the step's fp32 gradients come after the probe.
        to_come = 12 * trained // (self.world_size if self.options.zero_stage else 1)
        free_bytes = int(self._agree(memory.free() - to_come, dist.ReduceOp.MIN))

        def measure(tokens: int) -> tuple[float, int] | None:
            batch = self._probe_batch(tokens, self._longest)
            measured = measure_on_device(
                lambda: self._run_probe(batch), memory, lambda failed: bool(self._agree(failed, dist.ReduceOp.MAX))
            )
            if measured is None:
                return None
            seconds, peak = measured
            return self._agree(seconds, dist.ReduceOp.MAX), int(self._agree(peak, dist.ReduceOp.MAX))

        # At stage 3 ranks communicate in every layer, so none may run out of memory.
        share = 0.6 if self.options.zero_stage == 3 else 0.85
        return probe_token_budget(measure, free_bytes, MAX_GPU_TOKENS, share)

    def _run_probe(self, batch: Batch) -> None:
        """Runs a batch forward and backward and keeps no gradient. Communicates at stage 3 only."""
        self.engine.train()
        if self.options.zero_stage == 3:
            self.engine.set_gradient_accumulation_boundary(False)
            self.engine.backward(self._probe(self.engine, batch) * 0.0)
            self.engine.step()
            return
        trained = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        with torch.enable_grad():
            torch.autograd.grad(self._probe(self.module, batch), trained, allow_unused=True)

    def _probe_batch(self, tokens: int, longest: int) -> Batch:
        """Returns a batch of random sequences of the same length, at most ``longest``."""
        config = self.module.model.config.get_text_config()
        length = min(longest, tokens, getattr(config, "max_position_embeddings", longest))
        ids = np.random.default_rng(0).integers(0, config.vocab_size, (tokens // length, length))
        return self.module.batch_of(list(ids), self.device)

    def _agree(self, number: float, how: Any) -> float:
        agreed = torch.tensor(float(number), dtype=torch.float64, device=self.device)
        dist.all_reduce(agreed, how)
        return agreed.item()

    def _check_finite(
        self, value: float, losses: Sequence[tuple[Sequence[int], Tensor]], name_of: Callable[[int], str]
    ) -> None:
        """Raises on all ranks, naming the units at fault, if ``value``, which all ranks share, is not finite."""
        if isfinite(value):
            return
        mine = [pair for units, loss_U in losses for pair in zip(units, loss_U.tolist(), strict=True)]
        of_ranks: list[list[tuple[int, float]]] = [[] for _ in range(self.world_size)]
        dist.all_gather_object(of_ranks, mine)
        everything = [pair for pairs in of_ranks for pair in pairs]
        # A gradient can be infinite although every loss is finite. Then any unit of the batch may be the cause.
        bad = {unit for unit, loss in everything if not isfinite(loss)} or {unit for unit, _ in everything}
        raise NonFiniteLossError(self.step, [name_of(unit) for unit in sorted(bad)])


class EmbeddingGradient:
    """Gradient of an embedding, collected from sparse rows and made dense for the optimizer step.

    A step touches a few thousand rows of a table that may have a hundred thousand. Autograd would fill a table of zeros
    for every micro-batch. This class keeps one table and clears the touched rows after use.

    Attributes:
        dense: The dense gradient.
    """

    def __init__(self, embedding: nn.Embedding) -> None:
        embedding.sparse = True
        self._weight = embedding.weight
        self.dense = torch.zeros_like(embedding.weight)
        self._touched: list[Tensor] = []
        self._used = False

    def collect(self, is_last: bool) -> None:
        """Collects the gradient of one backward pass. After the last one, sets the dense gradient on the weight."""
        if self._used:
            for rows in self._touched:
                self.dense.index_fill_(0, rows, 0.0)
            self._touched, self._used = [], False
        gradient = self._weight.grad
        if gradient is not None and gradient.is_sparse:
            rows = gradient._indices()[0]
            self.dense.index_add_(0, rows, gradient._values())
            self._touched.append(rows)
            self._weight.grad = None
        if is_last:
            self._weight.grad, self._used = self.dense, True


def _undo_first_step(optimizer: Any) -> None:
    """Undoes the step on zero gradients that DeepSpeed's optimizer of stage 0 in bf16 takes to allocate its state.

    AdamW would count it, decay its weights and correct the bias of the first real step as if it were the second.
    """
    optimizer.refresh_fp32_params()
    optimizer.optimizer.state.clear()


def _schedule(optimizer: torch.optim.Optimizer, options: OptimizerConfig, total_steps: int) -> Any:
    name = "constant_with_warmup" if options.schedule == "constant" else options.schedule
    warmup_steps = round(options.warmup_fraction * total_steps)
    return get_scheduler(name, optimizer, num_warmup_steps=warmup_steps, num_training_steps=total_steps)
