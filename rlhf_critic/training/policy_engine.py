"""One rank's DeepSpeed engine around the policy of PPO and its frozen reference: log-probabilities, steps, weights.

The counterpart of `rlhf_critic.training.critic_engine`; every method is collective in the same way. Knows nothing about
Ray, text or rewards.

Shape legend: S rollouts, R response tokens of one rollout, A response tokens of a micro-batch.
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

from rlhf_critic.algorithms.ppo import estimate_kl
from rlhf_critic.algorithms.ppo_losses import LossMean, clipped_policy_loss
from rlhf_critic.algorithms.response_tokens import Masks, ResponseTokens, nonempty_responses, validate_rollouts
from rlhf_critic.batching.planner import plan_sequences
from rlhf_critic.batching.prefix_tree import TokenIds
from rlhf_critic.config.deepspeed import deepspeed_config
from rlhf_critic.config.model import BodyConfig, OptimizerConfig
from rlhf_critic.model.backbone import Batch, forward_micro_batches
from rlhf_critic.model.policy import SampledTokenStats, create_policy
from rlhf_critic.model.weights import gathered, persistent_tensors, save_weights
from rlhf_critic.training.engine import StepResult, TrainingEngine
from rlhf_critic.training.process_group import hardware_of_ranks
from rlhf_critic.training.rollout_step import TokensOnDevice, copy_tokens, take_rollout_step


@dataclass(frozen=True, kw_only=True)
class PolicyMetrics(StepResult):
    """Result of one optimizer step on the policy; means are over the response tokens.

    Attributes:
        loss: Mean clipped policy loss before the step, without the entropy term.
        clip_fraction: Fraction of the response tokens whose loss was the clipped one.
        entropy: Mean entropy, in nats.
        approx_kl: Mean KL divergence (k3) between the policy now and the one that sampled the tokens, in nats.
    """

    clip_fraction: float
    entropy: float
    approx_kl: float


class PolicyEngine:
    """A policy, its optimizer and its frozen reference on the ranks of ``torch.distributed``.

    Args:
        tokenizer: Tokenizer of the policy.
        model: Options of the policy.
        optimizer: Options of the optimizer.
        total_steps: Optimizer steps of the whole run, at which the schedule ends.
        seed: Random seed of dropout, if any.
        temperature: Sampling temperature of the rollouts.

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
        hardware = hardware_of_ranks()
        model = model.resolved(hardware.on_gpu)
        config = deepspeed_config(model, optimizer, hardware)
        self.policy = create_policy(model, tokenizer, config)
        self.training = TrainingEngine(self.policy, model, optimizer, total_steps, self._probe)
        self._reference = reference = create_policy(model, tokenizer, config).eval().requires_grad_(False)
        self._reference_module: Any = reference.to(self.training.device)
        if optimizer.zero_stage == 3:  # its parameters are partitioned too, so DeepSpeed must gather them
            import deepspeed

            inference = {key: config[key] for key in ("train_micro_batch_size_per_gpu", "bf16", "timers")}
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
        """Computes the reference's log-probability of every response token: ``S`` arrays, fp32 ``[R]``, in nats.

        Raises:
            ValueError: A prompt is empty or longer than its sequence.
        """
        validate_rollouts(sequences, prompt_lengths)
        counts_S = [len(ids) - length for ids, length in zip(sequences, prompt_lengths, strict=True)]
        nonempty = nonempty_responses(sequences, prompt_lengths)
        ends_S = np.cumsum(counts_S)
        flat = torch.zeros(int(ends_S[-1]) if len(ends_S) else 0, dtype=torch.float64, device=self.training.device)
        if nonempty:
            shortened = [sequences[row][:-1] for row in nonempty]
            training, backbone = self.training, self._reference
            plan = plan_sequences(shortened, training.world_size, training.token_budget, backbone.prefix_tree)

            def run(batch: Batch, units: Sequence[int]) -> SampledTokenStats:
                rows = [nonempty[unit] for unit in units]
                tokens = ResponseTokens.of([sequences[row] for row in rows], [prompt_lengths[row] for row in rows])
                return self._run(self._reference_module, batch, copy_tokens(tokens, training.device)[0])

            outputs = forward_micro_batches(backbone, shortened, plan[training.rank], run, training.device)
            for units, stats, _ in outputs:
                rows = [nonempty[unit] for unit in units]
                parts = stats.log_probs_A.double().split([counts_S[row] for row in rows])
                for row, part in zip(rows, parts, strict=True):
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
        masks: Masks | None = None,
        mean: LossMean = "token",
        clip_high: float | None = None,
        dual_clip: float | None = None,
    ) -> PolicyMetrics:
        """Takes one optimizer step on the mean clipped policy loss of all response tokens.

        Args:
            sequences: Token ids of prompt and response, the same on every rank.
            prompt_lengths: Tokens of each prompt, at least 1.
            old_log_probs: Log-probabilities with which the response tokens of every rollout were sampled, ``[R]``.
            advantages: Advantages of the response tokens of every rollout, ``[R]``.
            clip: See `rlhf_critic.algorithms.ppo_losses.clipped_policy_loss`, as for the other limits.
            entropy_coefficient: Weight of the entropy bonus, per nat.
            masks: See `rlhf_critic.training.rollout_step.take_rollout_step`, as for ``mean``.
            mean: Mean of the losses: over tokens, or over sequences.
            clip_high: Maximum rise of the ratio; None means ``clip``.
            dual_clip: Maximum ratio of tokens with negative advantages; None does not limit it.

        Raises:
            ValueError: See `rlhf_critic.training.rollout_step.take_rollout_step`.
            NonFiniteLossError: The loss is NaN or infinite (the step was not taken), or the gradient is.
        """

        def loss_of(batch: Batch, tokens: TokensOnDevice, numbers_A: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
            old_A, advantages_A = numbers_A
            output = self._run(self.training.engine, batch, tokens, entropy_gradient=entropy_coefficient != 0)
            loss_A, clipped_A = clipped_policy_loss(output.log_probs_A, old_A, advantages_A, clip, clip_high, dual_clip)
            kl_A = estimate_kl(old_A, output.log_probs_A.detach(), "k3")
            total_A = loss_A - entropy_coefficient * output.entropies_A
            return total_A, [loss_A, clipped_A, output.entropies_A, kl_A]

        numbers = {"old_log_probs": old_log_probs, "advantages": advantages}
        result, (loss, clip_fraction, entropy, approx_kl) = take_rollout_step(
            self.training, sequences, prompt_lengths, numbers, loss_of, self.seed, masks, mean
        )
        means = {"loss": loss, "clip_fraction": clip_fraction, "entropy": entropy, "approx_kl": approx_kl}
        return PolicyMetrics(**{**vars(result), **means})

    def weights(self) -> dict[str, Tensor]:
        """Returns the policy's full weights on the CPU, by their names in its state dict; empty except on rank 0."""
        weights: dict[str, Tensor] = {}
        for name, tensor in persistent_tensors(self.policy.model).items():
            with gathered(tensor):
                if self.training.rank == 0:
                    weights[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        return weights

    def save(self, directory: str | Path) -> None:
        """Writes a Hugging Face model directory, and the state that a resumed run needs to its folder ``resume``.

        The path must be the same on every rank but need not be shared storage. Each file is written by one rank, on
        its node.
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
        """Resumes from what `save` wrote on any number of ranks; the reference does not change.

        Raises:
            CheckpointError: See `rlhf_critic.training.engine.TrainingEngine.load_state`.
        """
        self.training.load_state(directory)

    def _run(
        self, module: Any, batch: Batch, tokens: TokensOnDevice, entropy_gradient: bool = False
    ) -> SampledTokenStats:
        """Runs a policy on a batch of rollouts that has these response tokens."""
        stats: SampledTokenStats = module(batch, *tokens, self.temperature, entropy_gradient)
        return stats

    def _probe(self, engine: Any, batch: Batch) -> Tensor:
        """Treats every token as a response token, which needs more logits than a training step is likely to."""
        sequences, length = batch.tokens_SL.shape
        rows = torch.arange(sequences, device=batch.tokens_SL.device).repeat_interleave(length)
        columns = torch.arange(length, device=batch.tokens_SL.device).repeat(sequences)
        stats: SampledTokenStats = engine(batch, rows, columns, torch.zeros_like(rows), self.temperature)
        return stats.log_probs_A.sum()
