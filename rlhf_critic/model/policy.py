"""Policy: a causal language model that computes the same batches as the critic.

`Policy` computes the log-probability of every sampled token, and the entropy of its distribution. In prefix trees
rollouts of one prompt compute the prompt once. The sampling distribution is defined in one place, `sampling_logits`,
which generation uses too. Knows nothing about DeepSpeed, text or rewards.

Shape legend: A response tokens, V vocabulary, D hidden size.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from rlhf_critic.config.model import BodyConfig, resolve_dtype
from rlhf_critic.model.backbone import Backbone, Batch
from rlhf_critic.model.factory import DTYPE_OF, create_hf_model, freeze_first_layers

# Logit of suppressed ids. It is finite, so that probability 0 times the logit is 0 in the entropy.
SUPPRESSED_LOGIT = -1e9
LOGITS_AT_ONCE = 1024  # tokens whose logits are in a GPU's memory at once: 0.6 GB for a vocabulary of 152,000


class SampledTokenStats(NamedTuple):
    """Log-probabilities of sampled tokens and entropies of their distributions, fp32 ``[A]``, in nats."""

    log_probs_A: Tensor
    entropies_A: Tensor


class _Fp32Product(torch.autograd.Function):
    """``x @ w.T`` of bf16 operands on a GPU, summed and returned in fp32.

    A logit of 25 that is rounded to bf16 is wrong by up to 0.06 nats, as much as an update changes it.
    """

    @staticmethod
    def forward(ctx: Any, x_AD: Tensor, weight_VD: Tensor) -> Tensor:
        """See the class."""
        ctx.save_for_backward(x_AD, weight_VD)
        return torch.mm(x_AD, weight_VD.T, out_dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Rounds the gradient to the operands' dtype, as a product in that dtype would."""
        x_AD, weight_VD = ctx.saved_tensors
        grad_AV, (of_x, of_weight) = grads[0].to(x_AD.dtype), ctx.needs_input_grad
        return grad_AV @ weight_VD if of_x else None, grad_AV.T @ x_AD if of_weight else None


def fp32_product(output: nn.Linear, x: Tensor) -> Tensor:
    """Computes the output layer without bias in fp32 from operands of any dtype, ``[..., D]`` to ``[..., V]``."""
    if x.dtype == torch.float32 or not x.is_cuda:
        return F.linear(x.float(), output.weight.float())
    return _Fp32Product.apply(x.flatten(0, -2), output.weight).view(*x.shape[:-1], -1)


class Policy(Backbone):
    """A family's ``*ForCausalLM`` model with its sampling distribution, which excludes the ``suppressed`` ids."""

    _suppressed_ids: Tensor

    def __init__(self, model: PreTrainedModel, suppressed: list[int], *, prefix_tree: bool = True) -> None:
        super().__init__(model, prefix_tree)
        self.suppressed = suppressed
        self.register_buffer("_suppressed_ids", torch.tensor(suppressed, dtype=torch.int64), persistent=False)
        output = model.get_output_embeddings()
        if isinstance(output, nn.Linear) and output.bias is None:
            # An attribute of the module, not a call beside it, so that ZeRO's hooks gather the weight.
            output.forward = functools.partial(fp32_product, output)

    def forward(
        self,
        batch: Batch,
        rows_A: Tensor,
        columns_A: Tensor,
        sampled_A: Tensor,
        temperature: float,
        entropy_gradient: bool = False,
    ) -> SampledTokenStats:
        """Computes log-probabilities of sampled tokens, and entropies.

        Call the module, not this method, so that ZeRO's hooks run.

        Args:
            batch: The rollouts; their last token may be missing.
            rows_A: Row in the batch of each token's rollout, int64 ``[A]``.
            columns_A: Index in the rollout of the token before the sampled one, int64 ``[A]``.
            sampled_A: Id of the sampled token, int64 ``[A]``.
            temperature: Sampling temperature.
            entropy_gradient: Whether the entropies carry a gradient, which needs memory.
        """
        hidden_AD = self.hidden(batch)[batch.tokens_SL[rows_A, columns_A]]
        at_once = LOGITS_AT_ONCE if hidden_AD.is_cuda else len(hidden_AD)
        return self._stats_in_parts(hidden_AD, sampled_A, temperature, entropy_gradient, at_once)

    def _stats_in_parts(
        self, hidden_AD: Tensor, sampled_A: Tensor, temperature: float, entropy_gradient: bool, at_once: int
    ) -> SampledTokenStats:
        """Computes the logits of ``at_once`` tokens at a time, and again in the backward pass, to keep none."""
        arguments = (temperature, entropy_gradient)
        if len(hidden_AD) <= at_once:
            return self._stats(hidden_AD, sampled_A, *arguments)
        parts = [
            checkpoint(self._stats, hidden, sampled, *arguments, use_reentrant=False, preserve_rng_state=False)
            for hidden, sampled in zip(hidden_AD.split(at_once), sampled_A.split(at_once), strict=True)
        ]
        return SampledTokenStats(*(torch.cat(one) for one in zip(*parts, strict=True)))

    def _stats(
        self, hidden_AD: Tensor, sampled_A: Tensor, temperature: float, entropy_gradient: bool
    ) -> SampledTokenStats:
        logits_AV = self._logits(hidden_AD).div_(temperature).index_fill_(1, self._suppressed_ids, SUPPRESSED_LOGIT)
        log_normalizers_A = logits_AV.logsumexp(-1)
        log_probs_A = logits_AV.gather(1, sampled_A[:, None])[:, 0] - log_normalizers_A
        with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
            probs_AV = (logits_AV - log_normalizers_A[:, None]).exp()
            entropies_A = log_normalizers_A - (probs_AV * logits_AV).sum(-1)
        return SampledTokenStats(log_probs_A, entropies_A)

    def _logits(self, hidden_AD: Tensor) -> Tensor:
        logits_AV = self.model.get_output_embeddings()(hidden_AD).float()
        softcap = getattr(self.model.config, "final_logit_softcapping", None)  # Gemma2 has one
        return logits_AV if softcap is None else softcap * torch.tanh(logits_AV / softcap)


def sampling_logits(logits_AV: Tensor, temperature: float, suppressed: list[int]) -> Tensor:
    """Returns the logits of the sampling distribution, fp32 ``[A, V]``.

    It applies the temperature and suppresses ids, nothing else. A truncated distribution (top-k, top-p) would give
    sampled tokens other probabilities than the policy in training.
    """
    ids = torch.tensor(suppressed, device=logits_AV.device, dtype=torch.int64)
    return (logits_AV.float() / temperature).index_fill(1, ids, SUPPRESSED_LOGIT)


def suppressed_ids(tokenizer: PreTrainedTokenizerBase, rows: int) -> list[int]:
    """Returns the ids that a policy must not sample: the pad token, and rows of the output layer without a token."""
    return sorted({int(tokenizer.pad_token_id), *range(len(tokenizer), rows)})


def create_policy(
    options: BodyConfig, tokenizer: PreTrainedTokenizerBase, ds_config: dict[str, Any] | None = None
) -> Policy:
    """Builds a policy without dropout from a base model, with its vocabulary padded like a critic's.

    Raises:
        CheckpointError: See `rlhf_critic.model.factory.create_hf_model`.
    """
    model = create_hf_model(
        AutoModelForCausalLM,
        options.path,
        tokenizer,
        ds_config,
        rlhf_training=True,
        disable_dropout=True,
        num_layers=options.num_layers,
        dtype=DTYPE_OF[resolve_dtype(options.dtype, on_gpu=False)],
        attn_implementation=None if options.attn_implementation == "auto" else options.attn_implementation,
    )
    suppressed = suppressed_ids(tokenizer, model.config.get_text_config().vocab_size)
    policy = Policy(model, suppressed, prefix_tree=options.prefix_tree)
    if options.freeze_layers:
        freeze_first_layers(policy, options.freeze_layers)
    return policy
