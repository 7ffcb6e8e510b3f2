"""One rank's DeepSpeed engine around the policy of PPO, and its frozen reference: log-probabilities, steps, weights.

The counterpart of `rlhf_critic.training.critic_engine` for the policy; every method is collective in the same way. Knows nothing of
Ray, text or rewards.

Shape legend: S rollouts, R actions of one, A actions of a micro-batch, U rollouts of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_critic.algorithms.ppo import clipped_policy_loss, estimate_kl
from rlhf_critic.algorithms.response_tokens import ResponseTokens, nonempty_responses, validate_rollouts
from rlhf_critic.batching.planner import plan_sequences
from rlhf_critic.batching.prefix_tree import TokenIds
from rlhf_critic.config.deepspeed import deepspeed_config
from rlhf_critic.config.model import BodyConfig, OptimizerConfig
from rlhf_critic.model.backbone import forward_micro_batches
from rlhf_critic.model.policy import Drawn, create_policy
from rlhf_critic.model.weights import gathered, persistent_tensors, save_weights
from rlhf_critic.training.engine import Batch, MicroBatchLoss, TrainingEngine


@dataclass(frozen=True)
class PolicyMetrics:
    """What one optimizer step on the policy did, over all ranks.

    Attributes:
        step: Steps done, this one included.
        loss: Mean clipped policy loss of the actions, before the step, without the entropy's part.
        clip_fraction: Share of the actions whose loss was the clipped one.
        entropy: Mean entropy, in nats.
        approx_kl: Mean KL divergence (k3) between the policy now and the one that drew the tokens, in nats.
        grad_norm: Global gradient norm before clipping.
        learning_rate: The rate the step was taken with.
        tokens: Tokens of all rollouts.
        computed_tokens: Tokens computed for them: what is shared once, padding and dummies included.
    """

    step: int
    loss: float
    clip_fraction: float
    entropy: float
    approx_kl: float
    grad_norm: float
    learning_rate: float
    tokens: int
    computed_tokens: int


class PolicyEngine:
    """A policy, its optimizer and its frozen reference on the ranks of ``torch.distributed``.

    Args:
        tokenizer: Of the policy.
        model: Options of the policy.
        optimizer: Options of the optimization.
        total_steps: Optimizer steps of the whole run; the schedule ends there.
        seed: Of dropout, if any.
        temperature: With which tokens are drawn.

    Raises:
        CheckpointError: See `rlhf_critic.model.factory.create_hf_model`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        model: BodyConfig,
        optimizer: OptimizerConfig,
        total_steps: int,
        seed: int,
        temperature: float,
    ) -> None:
        self.tokenizer = tokenizer
        self.seed = seed
        self.temperature = temperature
        config = deepspeed_config(model, optimizer)
        self.policy = create_policy(model, tokenizer, config)
        self.training = TrainingEngine(self.policy, model, optimizer, total_steps, self._probe)
        reference = create_policy(model, tokenizer, config).eval().requires_grad_(False)
        self._reference = reference
        self._reference_module: Any = reference.to(self.training.device)
        if optimizer.zero_stage == 3:  # its parameters are partitioned too, so that DeepSpeed must gather them
            import deepspeed

            inference = {key: config[key] for key in ("train_micro_batch_size_per_gpu", "bf16")}
            self._reference_module, *_ = deepspeed.initialize(
                model=reference, config={**inference, "zero_optimization": {"stage": 3}}
            )

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.training.step

    def reference_log_probs(
        self, sequences: Sequence[TokenIds], prompt_lengths: Sequence[int]
    ) -> list[NDArray[np.float32]]:
        """The log-probability of every action under the frozen reference: ``S`` arrays, fp32 ``[R]``, in nats.

        Raises:
            ValueError: A prompt is empty or longer than its sequence.
        """
        validate_rollouts(sequences, prompt_lengths)
        counts_S = [len(ids) - length for ids, length in zip(sequences, prompt_lengths, strict=True)]
        fitted = nonempty_responses(sequences, prompt_lengths)
        ends_S = np.cumsum(counts_S)
        flat = torch.zeros(int(ends_S[-1]) if len(ends_S) else 0, dtype=torch.float64, device=self.training.device)
        if fitted:
            shortened = [sequences[row][:-1] for row in fitted]
            training = self.training
            plan = plan_sequences(shortened, training.world_size, training.token_budget, self._reference.prefix_tree)

            def run(batch: Batch, units: Sequence[int]) -> Drawn:
                rows = [fitted[unit] for unit in units]
                return self._drawn(self._reference_module, batch, rows, sequences, prompt_lengths)

            for units, drawn, _ in forward_micro_batches(
                self._reference, shortened, plan[training.rank], run, training.device
            ):
                parts = drawn.log_probs_A.double().split([counts_S[fitted[unit]] for unit in units])
                for unit, part in zip(units, parts, strict=True):
                    row = fitted[unit]
                    flat[int(ends_S[row]) - counts_S[row] : int(ends_S[row])] = part
        dist.all_reduce(flat)
        return np.split(flat.float().cpu().numpy(), ends_S[:-1]) if len(ends_S) else []

    def update(
        self,
        sequences: Sequence[TokenIds],
        prompt_lengths: Sequence[int],
        old_log_probs: Sequence[NDArray[np.floating]],
        advantages: Sequence[NDArray[np.floating]],
        clip: float,
        entropy_coefficient: float = 0.0,
    ) -> PolicyMetrics:
        """Takes one optimizer step on the mean clipped policy loss of all actions of some rollouts.

        Args:
            sequences: Token ids of prompt and response, the same on every rank.
            prompt_lengths: Tokens of each prompt, at least 1.
            old_log_probs: For every rollout the log-probability with which each action was drawn, ``[R]``.
            advantages: And its advantage, ``[R]``.
            clip: See `rlhf_critic.algorithms.ppo.clipped_policy_loss`.
            entropy_coefficient: What a nat of entropy is worth.

        Raises:
            ValueError: Shapes do not fit, a number is not finite, or no rollout has an action.
            NonFiniteLossError: The loss is NaN or infinite (the step was not taken), or the gradient is.
        """
        validate_rollouts(sequences, prompt_lengths, old_log_probs=old_log_probs, advantages=advantages)
        fitted = nonempty_responses(sequences, prompt_lengths)
        if not fitted:
            raise ValueError("no rollout has an action: there is nothing to fit the policy to")
        device = self.training.device

        def loss_of(batch: Batch, units: Sequence[int]) -> MicroBatchLoss:
            rows = [fitted[unit] for unit in units]
            drawn = self._drawn(
                self.training.engine, batch, rows, sequences, prompt_lengths, entropy_gradient=entropy_coefficient != 0
            )
            old_A, advantages_A = (
                torch.from_numpy(np.concatenate([numbers[row] for row in rows])).to(device, torch.float32)
                for numbers in (old_log_probs, advantages)
            )
            loss_A, clipped_A = clipped_policy_loss(drawn.log_probs_A, old_A, advantages_A, clip)
            counts_U = torch.tensor([len(advantages[row]) for row in rows], device=device)
            rows_A = torch.arange(len(rows), device=device).repeat_interleave(counts_U)
            total_A = loss_A - entropy_coefficient * drawn.entropies_A
            moved_A = estimate_kl(old_A, drawn.log_probs_A.detach(), "k3")
            sums = [loss_A.detach(), clipped_A, drawn.entropies_A.detach(), moved_A]
            return MicroBatchLoss(
                total_A.new_zeros(len(rows)).index_add(0, rows_A, total_A),
                torch.stack([numbers.double().sum() for numbers in sums]),
            )

        actions = sum(len(advantages[row]) for row in fitted)
        result = self.training.take_step(
            [[sequences[row][:-1]] for row in fitted],
            loss_of,
            actions,
            self.seed,
            lambda unit: f"rollout {fitted[unit]}",
        )
        loss, clip_fraction, entropy, approx_kl = (number / actions for number in result.sums)
        return PolicyMetrics(
            step=self.step,
            loss=loss,
            clip_fraction=clip_fraction,
            entropy=entropy,
            approx_kl=approx_kl,
            grad_norm=result.grad_norm,
            learning_rate=result.learning_rate,
            tokens=sum(len(ids) for ids in sequences),
            computed_tokens=result.computed_tokens,
        )

    def weights(self) -> dict[str, Tensor]:
        """The policy's weights, whole and on the CPU, by the names of its state dict; on rank 0, nothing elsewhere."""
        whole: dict[str, Tensor] = {}
        for name, tensor in persistent_tensors(self.policy.model).items():
            with gathered(tensor):
                if self.training.rank == 0:
                    whole[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        return whole

    def save(self, directory: str | Path) -> None:
        """Writes a Hugging Face model directory and beside it, in ``resume``, what a continued run needs.

        Every rank needs the same path, which need not be shared: each file is written by one rank, on its node.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        save_weights(self.policy.model, directory, is_main=self.training.rank == 0)
        if self.training.rank == 0:
            config = type(self.policy.model.config).from_dict(self.policy.model.config.to_dict())
            config.architectures = [type(self.policy.model).__name__]
            config.dtype = next(self.policy.model.parameters()).dtype
            config.save_pretrained(directory)
            self.tokenizer.save_pretrained(directory)
        self.training.save_state(directory)

    def load(self, directory: str | Path) -> None:
        """Continues from what `save` wrote on any number of ranks; the reference stays what it was.

        Raises:
            CheckpointError: See `rlhf_critic.training.engine.TrainingEngine.load_state`.
        """
        self.training.load_state(directory)

    def _drawn(
        self,
        module: Any,
        batch: Batch,
        rows: Sequence[int],
        sequences: Sequence[TokenIds],
        prompt_lengths: Sequence[int],
        entropy_gradient: bool = False,
    ) -> Drawn:
        """What a policy says of the actions of these rollouts, which are the batch."""
        actions = ResponseTokens.of([sequences[row] for row in rows], [prompt_lengths[row] for row in rows])
        places = (torch.from_numpy(numbers).to(self.training.device) for numbers in (*actions.places, actions.drawn_A))
        drawn: Drawn = module(batch, *places, self.temperature, entropy_gradient)
        return drawn

    def _probe(self, engine: Any, batch: Batch) -> Tensor:
        """Every token as an action: more logits than a step is likely to need."""
        sequences, length = batch.tokens_SL.shape
        rows = torch.arange(sequences, device=batch.tokens_SL.device).repeat_interleave(length)
        columns = torch.arange(length, device=batch.tokens_SL.device).repeat(sequences)
        drawn: Drawn = engine(batch, rows, columns, torch.zeros_like(rows), self.temperature)
        return drawn.log_probs_A.sum()
