"""One rank's DeepSpeed engine around the critic: fit it to preferences or returns, score, save, load.

Every method is collective: all ranks call it with the same arguments, in the same order, and get the same result.
Which rank computes what is decided inside, so a caller cannot make ranks disagree. The caller initialises
``torch.distributed`` first. Knows nothing of Ray, text or who calls it.

Shape legend: P preferences of a micro-batch, G of a global batch, S sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from rlhf_critic.algorithms.ppo import clipped_value_loss
from rlhf_critic.algorithms.preference_objective import needs_values, preference_loss
from rlhf_critic.algorithms.response_tokens import ResponseTokens, nonempty_responses, validate_rollouts
from rlhf_critic.batching.prefix_tree import IntArray, TokenIds
from rlhf_critic.checkpoint.critic_directory import CriticCard, save_critic
from rlhf_critic.config.deepspeed import deepspeed_config
from rlhf_critic.config.model import ModelConfig
from rlhf_critic.config.train import TrainConfig
from rlhf_critic.data.encoding import Encoder
from rlhf_critic.data.preference_dataset import EncodedPreferences
from rlhf_critic.errors import DataError, NonFiniteLossError
from rlhf_critic.evaluation.preferences import Evaluation, evaluate_rewards
from rlhf_critic.model.critic import Critic
from rlhf_critic.model.factory import DTYPE_OF, create_critic_model, limit_training, validate_positions
from rlhf_critic.training.engine import Batch, MicroBatchLoss, TrainingEngine
from rlhf_critic.training.inference_engine import InferenceEngine


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


@dataclass(frozen=True)
class ValueMetrics:
    """What one optimizer step on values did, over all ranks.

    Attributes:
        step: Steps done, this one included.
        loss: Mean value loss of the actions, before the step.
        clip_fraction: Share of the actions whose loss was the clipped one.
        grad_norm: Global gradient norm before clipping.
        learning_rate: The rate the step was taken with.
        tokens: Tokens of all rollouts.
        computed_tokens: Tokens computed for them: what is shared once, padding and dummies included.
    """

    step: int
    loss: float
    clip_fraction: float
    grad_norm: float
    learning_rate: float
    tokens: int
    computed_tokens: int


class CriticEngine(InferenceEngine):
    """A critic, its optimizer and its schedule, sharded by DeepSpeed over the ranks of ``torch.distributed``.

    Args:
        critic: Built with the ``deepspeed_config`` of the same options (under ZeRO-3 it is partitioned already).
        model: Options of the model.
        train: Options of the optimization.
        total_steps: Optimizer steps of the whole run; the schedule ends there.

    Attributes:
        training: The optimizer's side of the engine.
    """

    def __init__(self, critic: Critic, model: ModelConfig, train: TrainConfig, total_steps: int) -> None:
        self.options = train
        self.training = TrainingEngine(
            critic, model, train, total_steps, lambda engine, batch: engine(batch, rewards_only=True).sum()
        )
        super().__init__(critic, self.training.engine, token_budget=0)  # see `token_budget`

    @classmethod
    def from_pretrained(
        cls,
        encoder: Encoder,
        model: ModelConfig,
        train: TrainConfig,
        total_steps: int,
        *,
        rlhf_training: bool = False,
    ) -> CriticEngine:
        """Builds the critic from a base model, on all ranks with the same head.

        Args:
            encoder: Gives the tokenizer and the length limit.
            model: Options of the model.
            train: Options of the optimization.
            total_steps: Optimizer steps of the whole run; the schedule ends there.
            rlhf_training: Whether ``model.path`` is a trained critic: then a missing head is an error.

        Raises:
            CheckpointError: See `rlhf_critic.model.factory.create_hf_model`.
        """
        torch.manual_seed(train.seed)
        critic = create_critic_model(
            model.path,
            encoder.tokenizer,
            deepspeed_config(model, train),
            rlhf_training=rlhf_training,
            disable_dropout=model.disable_dropout,
            num_layers=model.num_layers,
            head_init=model.head_init,
            dtype=DTYPE_OF[model.dtype],
            attn_implementation=None if model.attn_implementation == "auto" else model.attn_implementation,
            prefix_tree=model.prefix_tree,
        )
        validate_positions(critic.model, encoder.max_length)
        limit_training(critic, model, train.seed)
        return cls(critic, model, train, total_steps)

    @property
    def token_budget(self) -> int:
        """The most tokens of a micro-batch; the first look at it may be a probe, on all ranks together."""
        return self.training.token_budget

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.training.step

    def validate_preferences(self, preferences: EncodedPreferences) -> None:
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
        options = self.options
        units = [pair.responses for pair in preferences.take(rows_G)]

        def loss_of(batch: Batch, positions: Sequence[int]) -> MicroBatchLoss:
            output = self._engine(batch, rewards_only=not needs_values(options))
            chosen = [units[position] for position in positions]
            judged = preference_loss(output, chosen, preferences.margins_N[rows_G[list(positions)]], options)
            return MicroBatchLoss(judged.loss_P, judged.sums())

        def name_of(position: int) -> str:
            return preferences.origin(int(rows_G[position]))

        result = self.training.take_step(units, loss_of, len(rows_G), options.seed, name_of)
        right_sum, margin_sum = result.sums
        return StepMetrics(
            step=self.step,
            loss=result.loss,
            accuracy=right_sum / len(rows_G),
            margin=margin_sum / len(rows_G),
            grad_norm=result.grad_norm,
            learning_rate=result.learning_rate,
            tokens=int(preferences.tokens_N[rows_G].sum()),
            computed_tokens=result.computed_tokens,
            micro_batches=result.micro_batches,
        )

    def update(
        self,
        sequences: Sequence[TokenIds],
        prompt_lengths: Sequence[int],
        returns: Sequence[NDArray[np.floating]],
        old_values: Sequence[NDArray[np.floating]],
        clip: float | None,
    ) -> ValueMetrics:
        """Takes one optimizer step on the mean value loss of all actions of some rollouts; see `rlhf_critic.algorithms.ppo`.

        Rollouts of one prompt compute it once, as in `values`; the last token of a rollout, whose value stands before
        no action, is not computed. A rollout with an empty response adds nothing.

        Args:
            sequences: Token ids of prompt and response, the same on every rank.
            prompt_lengths: Tokens of each prompt, at least 1.
            returns: For every rollout what the value of each action should be, ``[R]``.
            old_values: And what it was when the rollouts were made, ``[R]``.
            clip: See `rlhf_critic.algorithms.ppo.clipped_value_loss`.

        Raises:
            ValueError: Shapes do not fit, a number is not finite, or no rollout has an action.
            NonFiniteLossError: The loss is NaN or infinite (the step was not taken), or the gradient is.
        """
        validate_rollouts(sequences, prompt_lengths, returns=returns, old_values=old_values)
        fitted = nonempty_responses(sequences, prompt_lengths)
        if not fitted:
            raise ValueError("no rollout has an action: there is nothing to fit the values to")

        def loss_of(batch: Batch, positions: Sequence[int]) -> MicroBatchLoss:
            rows = [fitted[position] for position in positions]
            actions = ResponseTokens.of([sequences[row] for row in rows], [prompt_lengths[row] for row in rows])
            values_SL = self._engine(batch)
            rows_A, columns_A = (torch.from_numpy(places).to(self.device) for places in actions.places)
            old_A, returns_A = (
                torch.from_numpy(np.concatenate([numbers[row] for row in rows])).to(self.device, torch.float32)
                for numbers in (old_values, returns)
            )
            loss_A, clipped_A = clipped_value_loss(values_SL[rows_A, columns_A], old_A, returns_A, clip)
            loss_U = loss_A.new_zeros(len(rows)).index_add(0, rows_A, loss_A)
            return MicroBatchLoss(loss_U, clipped_A.sum()[None].double())

        actions = sum(len(returns[row]) for row in fitted)
        result = self.training.take_step(
            [[sequences[row][:-1]] for row in fitted],
            loss_of,
            actions,
            self.options.seed,
            lambda position: f"rollout {fitted[position]}",
        )
        return ValueMetrics(
            step=self.step,
            loss=result.loss,
            clip_fraction=result.sums[0] / actions,
            grad_norm=result.grad_norm,
            learning_rate=result.learning_rate,
            tokens=sum(len(ids) for ids in sequences),
            computed_tokens=result.computed_tokens,
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

        All ranks of a node need the same path, nodes need not: each file is written by one rank, on its node.
        """
        save_critic(directory, self.critic, encoder, card, is_main=self.rank == 0)
        self.training.save_state(directory)

    def load(self, directory: str | Path) -> None:
        """Continues from what `save` wrote on any number of ranks: weights, optimizer, schedule and step.

        DeepSpeed unpickles this state, so load only what this project wrote.

        Raises:
            CheckpointError: See `rlhf_critic.training.engine.TrainingEngine.load_state`.
        """
        self.training.load_state(directory)
