"""One rank's DeepSpeed engine around the critic: trains it on preferences or returns, scores, saves and loads.

Every method is collective; see `rlhf_critic.training.engine`. The engine decides which rank computes what, so a caller
cannot make ranks disagree. The caller initialises ``torch.distributed`` first. Knows nothing about Ray, text or who
calls it.

Shape legend: P preferences of a micro-batch, G of a global batch, S sequences.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from rlhf_critic.algorithms.head_posterior import HeadPosterior
from rlhf_critic.algorithms.ppo_losses import LossMean, clipped_value_loss
from rlhf_critic.algorithms.preference_objective import (
    Targets,
    blended_loss,
    preference_loss,
    reads_values,
)
from rlhf_critic.algorithms.response_tokens import Masks
from rlhf_critic.batching.prefix_tree import IntArray, TokenIds
from rlhf_critic.checkpoint.critic_directory import CriticCard, save_critic
from rlhf_critic.config.deepspeed import deepspeed_config
from rlhf_critic.config.model import ModelConfig, resolve_dtype
from rlhf_critic.config.train import TrainConfig
from rlhf_critic.data.encoding import Encoder
from rlhf_critic.data.preference_dataset import PREFERENCE, EncodedPreferences
from rlhf_critic.errors import ConfigError, DataError, NonFiniteLossError
from rlhf_critic.evaluation.pointwise import PointwiseEvaluation, evaluate_pointwise
from rlhf_critic.evaluation.preferences import Evaluation, evaluate_rewards
from rlhf_critic.model.backbone import Batch
from rlhf_critic.model.critic import Critic
from rlhf_critic.model.factory import DTYPE_OF, create_critic_model, limit_training, validate_positions
from rlhf_critic.model.router_loss import RouterRecorder
from rlhf_critic.training.engine import PROBE_LENGTH, MicroBatchLoss, PreparedStep, StepResult, TrainingEngine
from rlhf_critic.training.inference_engine import InferenceEngine
from rlhf_critic.training.posterior_fit import (
    MAX_PREFERENCES,
    MAX_VALIDATION,
    MIN_VALIDATION,
    DistributedRanks,
    FitReport,
    fit_bytes,
    fit_head_posterior,
    sample_units,
)
from rlhf_critic.training.process_group import hardware_of_ranks, raise_on_all_ranks
from rlhf_critic.training.rollout_step import TokensOnDevice, take_rollout_step

MAX_COST_OF_POSTERIOR = 0.04  # as a part of the run


@dataclass(frozen=True, eq=False)
class PreparedPreferences:
    """A global batch of preferences, ready to be computed.

    Attributes:
        preferences: The encoded preferences.
        rows_G: Indices of the global batch in ``preferences``.
        units: Token ids of the responses of each preference, the best first.
        targets: Targets of each row; None for a preference.
        step: This rank's part.
    """

    preferences: EncodedPreferences
    rows_G: IntArray
    units: Sequence[Sequence[TokenIds]]
    targets: Sequence[Targets | None]
    step: PreparedStep


@dataclass(frozen=True, kw_only=True)
class StepMetrics(StepResult):
    """Result of one optimizer step on preferences.

    Attributes:
        accuracy: Fraction of the global batch's preferences whose chosen side had the higher reward; a tie counts half.
        margin: Mean of chosen minus rejected reward.
        label_accuracy: Share of labels on whose side the value is, over the rows with labels; None without such rows.
    """

    accuracy: float
    margin: float
    label_accuracy: float | None = None


@dataclass(frozen=True, kw_only=True)
class ValueMetrics(StepResult):
    """Result of one optimizer step on values; the loss is the mean value loss of the response tokens.

    Attributes:
        clip_fraction: Fraction of the response tokens whose loss was the clipped one.
    """

    clip_fraction: float


class CriticEngine(InferenceEngine):
    """A critic, its optimizer and its schedule, sharded by DeepSpeed over the ranks of ``torch.distributed``.

    Args:
        critic: The critic, built with the ``deepspeed_config`` of the same options (under ZeRO-3 already partitioned).
        model: Options of the model.
        train: Options of loss and optimizer.
        total_steps: Optimizer steps of the whole run, at which the schedule ends.
        longest: Maximum length of a sequence in tokens.

    Attributes:
        training: The training engine around the critic.
    """

    def __init__(
        self, critic: Critic, model: ModelConfig, train: TrainConfig, total_steps: int, longest: int = PROBE_LENGTH
    ) -> None:
        self.options = train
        self.training = TrainingEngine(
            critic, model, train, total_steps, lambda engine, batch: engine(batch, rewards_only=True).sum(), longest
        )
        super().__init__(critic, self.training.engine, lambda: self.training.token_budget)
        self._routers = RouterRecorder(critic.model) if train.router_loss_coefficient else None

    @classmethod
    def from_pretrained(
        cls, encoder: Encoder, model: ModelConfig, train: TrainConfig, total_steps: int, *, rlhf_training: bool = False
    ) -> CriticEngine:
        """Builds the critic from a base model, with the same head on all ranks.

        Args:
            encoder: The encoder, which provides the tokenizer and the maximum length.
            model: Options of the model.
            train: Options of loss and optimizer.
            total_steps: Optimizer steps of the whole run, at which the schedule ends.
            rlhf_training: Whether ``model.path`` is a trained critic. If so, a missing head is an error.

        Raises:
            CheckpointError: See `rlhf_critic.model.factory.create_hf_model`.
        """
        hardware = hardware_of_ranks()
        torch.manual_seed(train.seed)
        critic = create_critic_model(
            model.path,
            encoder.tokenizer,
            deepspeed_config(model, train, hardware),
            rlhf_training=rlhf_training,
            disable_dropout=model.disable_dropout,
            num_layers=model.num_layers,
            head_init=model.head_init,
            dtype=DTYPE_OF[resolve_dtype(model.dtype, hardware.on_gpu)],
            attn_implementation=None if model.attn_implementation == "auto" else model.attn_implementation,
            prefix_tree=model.prefix_tree,
        )
        validate_positions(critic.model, encoder.max_length)
        limit_training(critic, model, train.seed)
        return cls(critic, model, train, total_steps, encoder.max_length)

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.training.step

    def validate_preferences(self, preferences: EncodedPreferences) -> None:
        """Checks that the loss is defined for every preference.

        Raises:
            DataError: The loss is not defined for a preference; names the first one.
        """
        is_pair_N = preferences.kinds_N == PREFERENCE
        ranked_N = preferences.sizes_N > 2
        if self.options.loss == "per_token" and ranked_N.any():
            place = preferences.origin(int(ranked_N.argmax()))
            raise DataError(f"{place}: ranks more than two responses, but train.loss per_token takes two")
        unknown_N = np.isnan(preferences.margins_N) & is_pair_N
        if self.options.margin_scale and unknown_N.any():
            place = preferences.origin(int(unknown_N.argmax()))
            raise DataError(
                f"{place}: field 'margin': missing here and in {unknown_N.sum()} of {len(preferences)} preferences; "
                "train.margin_scale needs it (or chosen_score and rejected_score): add it, or set the scale to 0"
            )

    def prepare(self, preferences: EncodedPreferences, rows_G: IntArray) -> PreparedPreferences:
        """Reads a global batch and plans it; see `rlhf_critic.training.engine.TrainingEngine.prepare`.

        Args:
            preferences: The encoded preferences.
            rows_G: Indices of the global batch in ``preferences``, the same on every rank.
        """
        rows = preferences.take(rows_G)
        units = [row.responses for row in rows]
        targets = [Targets(row.kind, row.targets_A, row.tokens_A) if len(row.targets_A) else None for row in rows]
        return PreparedPreferences(preferences, rows_G, units, targets, self.training.prepare(units))

    def train_step(self, preferences: EncodedPreferences, rows_G: IntArray) -> StepMetrics:
        """Prepares a global batch and takes one optimizer step on it; see `prepare` and `take_step`."""
        return self.take_step(self.prepare(preferences, rows_G))

    def take_step(self, prepared: PreparedPreferences) -> StepMetrics:
        """Takes one optimizer step on the mean loss of a global batch.

        Raises:
            NonFiniteLossError: The loss is NaN or infinite (the step was not taken), or the gradient is.
        """
        options, preferences, rows_G, units = self.options, prepared.preferences, prepared.rows_G, prepared.units
        targets = prepared.targets
        is_blended = any(targets)

        def loss_of(batch: Batch, positions: Sequence[int]) -> MicroBatchLoss:
            responses = [units[position] for position in positions]
            of_rows = [targets[position] for position in positions]
            with self._routers or nullcontext():
                output = self._engine(
                    batch, rewards_only=not reads_values(options, of_rows), every_token=self._routers is not None
                )
            margins_P = preferences.margins_N[rows_G[list(positions)]]
            if is_blended:
                loss_P, sums = blended_loss(output, responses, of_rows, margins_P, options)
            else:
                result = preference_loss(output, responses, margins_P, options)
                loss_P, sums = result.loss_P, result.sums()
            return MicroBatchLoss(loss_P + self._router_loss(batch, responses), sums)

        step, (right_sum, margin_sum, *labels) = self.training.take_step(
            prepared.step,
            loss_of,
            denominator=len(rows_G),
            tokens=int(preferences.tokens_N[rows_G].sum()),
            seed=options.seed,
            name_of=lambda position: preferences.origin(int(rows_G[position])),
        )
        pairs = max(1, sum(one is None for one in targets))
        return StepMetrics(
            **vars(step),
            accuracy=right_sum / pairs,
            margin=margin_sum / pairs,
            label_accuracy=labels[0] / labels[1] if labels and labels[1] else None,
        )

    def _router_loss(self, batch: Batch, units: Sequence[Sequence[TokenIds]]) -> Tensor | float:
        """Returns the weighted mean load-balancing loss of each unit's sequences, ``[P]``; 0 without such a loss."""
        if self._routers is None:
            return 0.0
        loss_S = self._routers.loss(batch, [len(ids) for unit in units for ids in unit])
        of_units = loss_S.split([len(unit) for unit in units])
        return self.options.router_loss_coefficient * torch.stack([one.mean() for one in of_units])

    def update(
        self,
        sequences: Sequence[TokenIds],
        prompt_lengths: Sequence[int],
        returns: Sequence[NDArray[np.floating]],
        old_values: Sequence[NDArray[np.floating]],
        clip: float | None,
        masks: Masks | None = None,
        mean: LossMean = "token",
    ) -> ValueMetrics:
        """Takes one optimizer step on the mean value loss of all response tokens.

        A prefix that several rollouts share is computed once, as in `values`: a prompt, or a prompt with some turns. A
        rollout with an empty response adds nothing.

        Args:
            sequences: Token ids of prompt and response, the same on every rank.
            prompt_lengths: Tokens of each prompt, at least 1.
            returns: Target values of the response tokens of every rollout, ``[R]``.
            old_values: Values of the response tokens when the rollouts were generated, ``[R]``.
            clip: See `rlhf_critic.algorithms.ppo_losses.clipped_value_loss`.
            masks: See `rlhf_critic.training.rollout_step.take_rollout_step`, as for ``mean``.
            mean: Mean of the losses: over tokens, or over sequences.

        Raises:
            ValueError: See `rlhf_critic.training.rollout_step.take_rollout_step`.
            NonFiniteLossError: The loss is NaN or infinite (the step was not taken), or the gradient is.
        """

        def loss_of(batch: Batch, tokens: TokensOnDevice, numbers_A: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
            returns_A, old_A = numbers_A
            values_A = self._engine(batch)[tokens.rows_A, tokens.columns_A]
            loss_A, clipped_A = clipped_value_loss(values_A, old_A, returns_A, clip)
            return loss_A, [clipped_A]

        numbers = {"returns": returns, "old_values": old_values}
        result, (clip_fraction,) = take_rollout_step(
            self.training, sequences, prompt_lengths, numbers, loss_of, self.options.seed, masks, mean
        )
        return ValueMetrics(**vars(result), clip_fraction=clip_fraction)

    def evaluate(self, preferences: EncodedPreferences) -> Evaluation | PointwiseEvaluation:
        """Scores all rows: compares both sides of preferences, and values with the targets of pointwise rows.

        Returns:
            The evaluation of the preferences, with that of the pointwise rows; or that of these alone.

        Raises:
            NonFiniteLossError: A reward is NaN or infinite.
        """
        pairs = preferences.pairs_alone()
        compared = self._evaluate_preferences(pairs) if len(pairs) else None
        if len(pairs) == len(preferences) and compared:
            return compared
        pointwise = self._evaluate_pointwise(preferences.select(np.flatnonzero(preferences.kinds_N != PREFERENCE)))
        return dataclasses.replace(compared, pointwise=pointwise) if compared else pointwise

    def _evaluate_preferences(self, preferences: EncodedPreferences) -> Evaluation:
        rewards_R = self.rewards(preferences.responses()).astype(np.float64)

        def judge() -> Evaluation:
            pairs = preferences.comparisons()
            better_P, worse_P = rewards_R[pairs.better_P], rewards_R[pairs.worse_P]
            bad_rows = np.unique(pairs.rows_P[~(np.isfinite(better_P) & np.isfinite(worse_P))])
            if len(bad_rows):
                raise NonFiniteLossError(self.step, [preferences.origin(int(row)) for row in bad_rows])
            return evaluate_rewards(better_P, worse_P, pairs.lengths_P2, pairs.subsets_P, pairs.rows_P)

        # The statistics of many preferences take seconds of a core, which the ranks of a node share.
        evaluation = [raise_on_all_ranks(lambda: judge() if self.rank == 0 else None)]
        dist.broadcast_object_list(evaluation, src=0)
        return cast(Evaluation, evaluation[0])

    def _evaluate_pointwise(self, rows: EncodedPreferences) -> PointwiseEvaluation:
        taken = rows.take(np.arange(len(rows)))
        values = self.values([row.responses[0] for row in taken])
        bad_rows = [row for row, value_T in enumerate(values) if not np.isfinite(value_T).all()]
        if bad_rows:
            raise NonFiniteLossError(self.step, [rows.origin(row) for row in bad_rows])
        return evaluate_pointwise(
            [row.kind for row in taken],
            [row.targets_A for row in taken],
            [value_T[row.tokens_A] for row, value_T in zip(taken, values, strict=True)],
            np.array([value_T[-1] for value_T in values], dtype=np.float64),
        )

    def fit_posterior(
        self, train: EncodedPreferences, validation: EncodedPreferences
    ) -> tuple[HeadPosterior, FitReport]:
        """Fits the posterior of the head on a sample of the preferences; see `rlhf_critic.training.posterior_fit`.

        A forward pass costs about a third of a training step. So the samples are chosen for at most
        `MAX_COST_OF_POSTERIOR` of what the run computed so far.

        Raises:
            DataError: There are too few validation preferences.
            ConfigError: A rank has too little memory. All ranks raise it, before anything is computed.
        """
        needed, free = fit_bytes(self.critic.model.config.get_text_config().hidden_size), self.training.free_memory()
        if free < needed:
            raise ConfigError(
                f"calibrating needs {needed / 1e9:.1f} GB of memory on each rank, and one has {free / 1e9:.1f} GB: run "
                "rlhf-critic calibrate on the checkpoint afterwards"
            )
        trained = self.step * self.options.global_batch_size
        affordable = int(3 * MAX_COST_OF_POSTERIOR * trained)
        units = sample_units(train, max(1, min(affordable * 3 // 4, MAX_PREFERENCES)), self.options.seed)
        held_out = sample_units(
            validation, max(MIN_VALIDATION, min(affordable // 4, MAX_VALIDATION)), self.options.seed
        )
        return fit_head_posterior(
            units, held_out, self.last_states, scale=len(train) / len(units), ranks=DistributedRanks(self.device)
        )

    def save(self, directory: str | Path, encoder: Encoder, card: CriticCard) -> None:
        """Writes a critic directory, and the state that a resumed run needs to its folder ``resume``.

        The path must be the same on all ranks of a node; nodes may differ. Each file is written by one rank, on its
        node.
        """
        save_critic(directory, self.critic, encoder, card, is_main=self.rank == 0)
        self.training.save_state(directory)

    def load(self, directory: str | Path) -> None:
        """Resumes from what `save` wrote on any number of ranks: weights, optimizer, schedule and step.

        DeepSpeed unpickles this state, so load only what this project wrote.

        Raises:
            CheckpointError: See `rlhf_critic.training.engine.TrainingEngine.load_state`.
        """
        self.training.load_state(directory)
