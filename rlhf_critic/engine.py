"""One rank's DeepSpeed engine around the critic: train, score, save, load.

Every method is collective: all ranks call it with the same arguments, in the same order, and get the same result.
Which rank computes what is decided inside, so a caller cannot make ranks disagree. The caller initialises
``torch.distributed`` first. Knows nothing of Ray, text or who calls it.

Shape legend: P preferences of a micro-batch, G of a global batch, S sequences.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isfinite
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from transformers import get_scheduler

from rlhf_critic.adapters import add_adapters
from rlhf_critic.batching import plan_micro_batches
from rlhf_critic.checkpoint import RESUME_FOLDER, CriticCard, save_critic, write_text_atomically
from rlhf_critic.config import ModelConfig, TrainConfig
from rlhf_critic.critic import Critic
from rlhf_critic.encoding import Encoder
from rlhf_critic.errors import CheckpointError, DataError, NonFiniteLossError
from rlhf_critic.evaluation import Evaluation, evaluate_rewards
from rlhf_critic.factory import DTYPE_OF, create_critic_model, freeze_first_layers, require_positions
from rlhf_critic.inference import InferenceEngine
from rlhf_critic.objective import judge, needs_values
from rlhf_critic.preference_table import EncodedPreferences
from rlhf_critic.prefix_tree import IntArray
from rlhf_critic.token_budget import ActivationMeter, Measurement, probe_token_budget
from rlhf_critic.weights import full_shape

STATE_NAME = "engine.json"
STATE_TAG = "state"
PROBE_LENGTH = 128  # tokens of each sequence in the probe of the token budget


@dataclass(frozen=True)
class StepMetrics:
    """What one optimizer step did, over all ranks.

    Attributes:
        step: Steps done, this one included.
        loss: Mean loss of the global batch, before the step.
        accuracy: Share of its preferences whose chosen side had the higher reward, a tie half.
        margin: Mean of chosen minus rejected reward.
        grad_norm: Global gradient norm before clipping.
        learning_rate: The rate the step was taken with.
        tokens: Tokens of the global batch, both sides of every preference.
        computed_tokens: Tokens computed for it: what is shared once, padding and dummies included.
        micro_batches: Micro-batches per rank.
    """

    step: int
    loss: float
    accuracy: float
    margin: float
    grad_norm: float
    learning_rate: float
    tokens: int
    computed_tokens: int
    micro_batches: int


def deepspeed_config(model: ModelConfig, train: TrainConfig) -> dict[str, Any]:
    """DeepSpeed's configuration for our options.

    The engine decides itself when a step ends (`CriticEngine.train_step`), so DeepSpeed is told that every micro-batch
    is a batch.
    """
    zero: dict[str, Any] = {
        "stage": train.zero_stage,
        # DeepSpeed's default bucket is 500 million elements, which ZeRO-3 sets aside before it has anything to reduce.
        "reduce_bucket_size": 20_000_000,
    }
    if train.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if train.offload_parameters:
        zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": train.max_grad_norm,
        "zero_optimization": zero,
        # Ours is torch's fused AdamW, on CPUs too; DeepSpeed's own would have to be compiled first.
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": model.dtype == "bfloat16"},
        "steps_per_print": 10**9,
    }


class CriticEngine(InferenceEngine):
    """A critic, its optimizer and its schedule, sharded by DeepSpeed over the ranks of ``torch.distributed``.

    Args:
        critic: Built with the ``ds_config`` of the same options (under ZeRO-3 it is partitioned already).
        model: Options of the model.
        train: Options of the optimization.
        total_steps: Optimizer steps of the whole run; the schedule ends there.
    """

    def __init__(self, critic: Critic, model: ModelConfig, train: TrainConfig, total_steps: int) -> None:
        self.options = train
        self.step = 0
        self._embedding_gradient: EmbeddingGradient | None = None
        if train.gradient_checkpointing:
            critic.model.gradient_checkpointing_enable({"use_reentrant": False})
        optimizer = torch.optim.AdamW(
            parameter_groups(critic, train.weight_decay),
            lr=train.learning_rate,
            betas=(train.adam_beta1, train.adam_beta2),
            eps=train.adam_epsilon,
            fused=True,  # one pass over memory instead of six
        )
        engine, *_ = deepspeed.initialize(
            model=critic,
            optimizer=optimizer,
            lr_scheduler=lambda wrapped: _schedule(wrapped, train, total_steps),
            config=deepspeed_config(model, train),
        )
        super().__init__(critic, engine, token_budget=0)  # see `token_budget`
        if self.world_size == 1 and train.zero_stage == 0:
            # DeepSpeed would flatten all gradients, reduce them over one rank and copy them back.
            self._engine.enable_backward_allreduce = False
            if model.dtype == "float32":
                embedding = critic.model.get_input_embeddings()
                if isinstance(embedding, nn.Embedding) and embedding.weight.requires_grad:
                    self._embedding_gradient = EmbeddingGradient(embedding)

    @classmethod
    def from_pretrained(
        cls, encoder: Encoder, model: ModelConfig, train: TrainConfig, total_steps: int
    ) -> CriticEngine:
        """Builds the critic from a base model, on all ranks with the same head.

        Raises:
            CheckpointError: See `rlhf_critic.factory.create_hf_model`.
        """
        torch.manual_seed(train.seed)
        critic = create_critic_model(
            model.path,
            encoder.tokenizer,
            deepspeed_config(model, train),
            disable_dropout=model.disable_dropout,
            num_layers=model.num_layers,
            head_init=model.head_init,
            dtype=DTYPE_OF[model.dtype],
            attn_implementation=None if model.attn_implementation == "auto" else model.attn_implementation,
            prefix_tree=model.prefix_tree,
        )
        require_positions(critic.model, encoder.max_length)
        if model.lora_rank:
            add_adapters(critic.model, model, train.seed)
        if model.freeze_layers:  # after the adapters, so that those of frozen layers are frozen too
            freeze_first_layers(critic, model.freeze_layers)
        return cls(critic, model, train, total_steps)

    @cached_property
    def token_budget(self) -> int:
        """The most tokens of a micro-batch: as configured, or found by a probe when it is first asked for."""
        if self.options.token_budget != "auto":
            return self.options.token_budget
        # Ranks of a node share its memory, but each has a GPU to itself.
        sharing = 1 if self.device.type == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size))
        free_bytes = get_accelerator().available_memory() // sharing
        return probe_token_budget(self._measure_micro_batch, int(self._agree(free_bytes, dist.ReduceOp.MIN)))

    def refuse_unfit(self, preferences: EncodedPreferences) -> None:
        """Checks that the loss is defined for every preference.

        Raises:
            DataError: Names the first for which it is not.
        """
        ranked_N = preferences.sizes_N > 2
        if self.options.loss == "per_token" and ranked_N.any():
            place = preferences.origin(int(ranked_N.argmax()))
            raise DataError(f"{place}: ranks more than two responses; per_token takes two")
        unknown_N = np.isnan(preferences.margins_N)
        if self.options.margin_scale and unknown_N.any():
            place = preferences.origin(int(unknown_N.argmax()))
            raise DataError(
                f"{place}: field 'margin': missing, as in {unknown_N.sum()} of {len(preferences)} preferences, and "
                "train.margin_scale needs it (or chosen_score and rejected_score): add it, or set the scale to 0"
            )

    def train_step(self, preferences: EncodedPreferences, rows_G: IntArray) -> StepMetrics:
        """Takes one optimizer step on the mean loss of a global batch.

        Args:
            preferences: The table that ``rows_G`` index.
            rows_G: The rows of the global batch, the same on every rank.

        Raises:
            NonFiniteLossError: The loss is NaN or infinite (the step was not taken), or the gradient is.
        """
        pairs = preferences.take(rows_G)
        units = [pair.responses for pair in pairs]
        plan = plan_micro_batches(units, self.world_size, self.token_budget, self.critic.prefix_tree)
        mine = plan[self.rank]
        # Dropout draws from (seed, step, rank), so a step that is run again after a failure draws the same.
        torch.manual_seed(int(np.random.SeedSequence([self.options.seed, self.step, self.rank]).generate_state(1)[0]))
        learning_rate = float(self._engine.get_lr()[0])
        self._engine.train()
        totals = torch.zeros(4, dtype=torch.float64, device=self.device)
        losses: list[tuple[list[int], Tensor]] = []
        for index, micro_batch in enumerate(mine):
            is_last = index == len(mine) - 1
            self._engine.set_gradient_accumulation_boundary(is_last)
            rows = rows_G[list(micro_batch.units)]
            chosen = [units[unit] for unit in micro_batch.units]
            batch = self.critic.batch_of([ids for responses in chosen for ids in responses], self.device)
            output = self._engine(batch, rewards_only=not needs_values(self.options))
            judged = judge(output, chosen, preferences.margins_N[rows], self.options)
            losses.append((rows.tolist(), judged.loss_P.detach()))
            if micro_batch.weight:
                totals[:3] += judged.sums()
            totals[3] += batch.computed_tokens
            if is_last:
                dist.all_reduce(totals)
                self._refuse_non_finite(float(totals[0]), losses, preferences)
            # DeepSpeed averages gradients over ranks; this makes the sum over ranks a mean over the global batch.
            self._engine.backward(judged.loss_P.sum() * (micro_batch.weight * self.world_size / len(rows_G)))
            if self._embedding_gradient:
                self._embedding_gradient.collect(is_last)
            if is_last and self.options.zero_stage == 0:
                # Nothing is sharded: gradients are whole here, and DeepSpeed neither keeps their norm nor checks it.
                grad_norm = float(get_total_norm([p.grad for p in self.critic.parameters() if p.grad is not None]))
                self._refuse_non_finite(grad_norm, losses, preferences)
            self._engine.step()
        if self.options.zero_stage > 0:
            grad_norm = float(self._engine.get_global_grad_norm())
            self._refuse_non_finite(grad_norm, losses, preferences)
        self.step += 1
        loss_sum, right_sum, margin_sum, computed_tokens = totals.tolist()
        return StepMetrics(
            step=self.step,
            loss=loss_sum / len(rows_G),
            accuracy=right_sum / len(rows_G),
            margin=margin_sum / len(rows_G),
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            tokens=int(preferences.tokens_N[rows_G].sum()),
            computed_tokens=int(computed_tokens),
            micro_batches=len(mine),
        )

    def evaluate(self, preferences: EncodedPreferences) -> Evaluation:
        """Scores both sides of all preferences and compares them.

        Raises:
            NonFiniteLossError: A reward is NaN or infinite.
        """
        rewards_R = self.rewards(preferences.responses()).astype(np.float64)
        pairs = preferences.comparisons()
        better_P, worse_P = rewards_R[pairs.better_P], rewards_R[pairs.worse_P]
        bad_rows = np.unique(pairs.rows_P[~(np.isfinite(better_P) & np.isfinite(worse_P))])
        if len(bad_rows):
            raise NonFiniteLossError(self.step, [preferences.origin(int(row)) for row in bad_rows])
        return evaluate_rewards(better_P, worse_P, pairs.lengths_P2, subsets_P=pairs.subsets_P)

    def save(self, directory: str | Path, encoder: Encoder, card: CriticCard) -> None:
        """Writes a critic directory and beside it, in ``resume``, what a continued run needs.

        Every node needs the same path, which need not be shared: each file is written by one rank, on its node.
        """
        directory = Path(directory)
        (directory / RESUME_FOLDER / STATE_TAG).mkdir(parents=True, exist_ok=True)
        save_critic(directory, self.critic, encoder, card, is_main=self.rank == 0)
        self._engine.save_checkpoint(str(directory / RESUME_FOLDER), tag=STATE_TAG)
        token_budget = self.token_budget  # on all ranks: the first look at it may be a probe
        if self.rank == 0:
            state = {
                "step": self.step,
                "world_size": self.world_size,
                "zero_stage": self.options.zero_stage,
                "token_budget": token_budget,
            }
            write_text_atomically(directory / RESUME_FOLDER / STATE_NAME, json.dumps(state))
        dist.barrier()

    def load(self, directory: str | Path) -> None:
        """Continues from what `save` wrote: weights, optimizer, schedule and step.

        DeepSpeed unpickles this state, so load only what this project wrote.

        Raises:
            CheckpointError: It is not there, or was saved with another world size or ZeRO stage.
        """
        resume = Path(directory) / RESUME_FOLDER
        try:
            state = json.loads((resume / STATE_NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{directory}: no state to resume from: {error}") from error
        for option, here in (("world_size", self.world_size), ("zero_stage", self.options.zero_stage)):
            if state[option] != here:
                raise CheckpointError(
                    f"{directory}: saved with {option}={state[option]}, now {here}; resume with the same"
                )
        self._engine.load_checkpoint(str(resume), tag=STATE_TAG)
        self.step = int(state["step"])
        if self.options.token_budget == "auto":
            self.token_budget = int(state["token_budget"])  # a new probe might find another, and sum in another order

    def _measure_micro_batch(self, tokens: int) -> Measurement:
        """Runs a micro-batch of weight zero, which changes nothing, and measures it; the slowest rank counts."""
        config = self.critic.model.config.get_text_config()
        length = min(PROBE_LENGTH, getattr(config, "max_position_embeddings", PROBE_LENGTH))
        ids = np.random.default_rng(0).integers(0, config.vocab_size, (tokens // length, length))
        batch = self.critic.batch_of(list(ids), self.device)
        meter = ActivationMeter()
        self._engine.train()
        self._engine.set_gradient_accumulation_boundary(False)
        with torch.enable_grad(), meter.running(self.critic.parameters(), get_accelerator().synchronize):
            self._engine.backward(self._engine(batch, rewards_only=True).sum() * 0.0)
            self._engine.step()
        if self._embedding_gradient:
            self._embedding_gradient.collect(is_last=False)
        seconds, activation_bytes = (
            self._agree(measured, dist.ReduceOp.MAX) for measured in (meter.seconds, meter.bytes)
        )
        return Measurement(seconds, int(activation_bytes))

    def _agree(self, number: float, how: Any) -> float:
        agreed = torch.tensor(float(number), dtype=torch.float64, device=self.device)
        dist.all_reduce(agreed, how)
        return agreed.item()

    def _refuse_non_finite(
        self, value: float, losses: Sequence[tuple[list[int], Tensor]], preferences: EncodedPreferences
    ) -> None:
        """Raises on all ranks if ``value``, the same on all ranks, is not finite; names the rows that caused it."""
        if isfinite(value):
            return
        mine = [
            row
            for rows, loss_P in losses
            for row, loss in zip(rows, loss_P.tolist(), strict=True)
            if not isfinite(loss)
        ]
        # A gradient can be infinite where every loss is finite: then any row of the batch may be the cause.
        of_ranks: list[list[list[int]]] = [[] for _ in range(self.world_size)]
        dist.all_gather_object(of_ranks, [mine, [row for rows, _ in losses for row in rows]])
        rows = {row for found, _ in of_ranks for row in found} or {row for _, rows in of_ranks for row in rows}
        raise NonFiniteLossError(self.step, [preferences.origin(row) for row in sorted(rows)])


class EmbeddingGradient:
    """The gradient of an embedding, row by row until a step needs it whole.

    A step touches a few thousand rows of a table that may have a hundred thousand: autograd would fill a table of zeros
    for every micro-batch. Here is one table, whose touched rows are cleared after use.
    """

    def __init__(self, embedding: nn.Embedding) -> None:
        embedding.sparse = True
        self._weight = embedding.weight
        self._whole = torch.zeros_like(embedding.weight)
        self._touched: list[Tensor] = []
        self._used = False

    def collect(self, is_last: bool) -> None:
        """Takes what a micro-batch's backward pass left; after the last, puts the whole gradient in its place."""
        if self._used:
            for rows in self._touched:
                self._whole.index_fill_(0, rows, 0.0)
            self._touched, self._used = [], False
        gradient = self._weight.grad
        if gradient is not None and gradient.is_sparse:
            rows = gradient._indices()[0]
            self._whole.index_add_(0, rows, gradient._values())
            self._touched.append(rows)
            self._weight.grad = None
        if is_last:
            self._weight.grad, self._used = self._whole, True


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Optimizer groups: decay applies to matrices, not to norms and biases; empty groups are left out."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trainable if len(full_shape(parameter)) > 1]
    others = [parameter for parameter in trainable if len(full_shape(parameter)) <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _schedule(optimizer: torch.optim.Optimizer, train: TrainConfig, total_steps: int) -> Any:
    name = "constant_with_warmup" if train.schedule == "constant" else train.schedule
    warmup_steps = round(train.warmup_fraction * total_steps)
    return get_scheduler(name, optimizer, num_warmup_steps=warmup_steps, num_training_steps=total_steps)
