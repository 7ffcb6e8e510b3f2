"""The policy: a causal language model that is computed over the same batches as the critic.

`Policy` gives the log-probability of every token that was drawn, and the entropy there, for rollouts in prefix trees:
rollouts of one prompt compute it once. The distribution that tokens are drawn from is defined in one place,
`sampling_logits`, which generation uses too. Knows nothing of DeepSpeed, text or rewards.

Shape legend: A actions, V vocabulary, T tokens that are computed, D hidden size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from rlhf_critic.batching.padded import PaddedBatch
from rlhf_critic.batching.prefix_tree import PrefixTreeBatch
from rlhf_critic.config.model import BodyConfig
from rlhf_critic.model.backbone import Backbone
from rlhf_critic.model.factory import DTYPE_OF, create_hf_model, freeze_first_layers

# Finite, so that a probability of 0 times its logit is 0 in the entropy.
NEVER_DRAWN = -1e9


class Drawn(NamedTuple):
    """What the policy says of the tokens that were drawn.

    Attributes:
        log_probs_A: The log-probability of each, fp32, in nats.
        entropies_A: The entropy of the distribution that each was drawn from, fp32, in nats.
    """

    log_probs_A: Tensor
    entropies_A: Tensor


class Policy(Backbone):
    """A causal language model with the distribution its tokens are drawn from.

    Args:
        model: The family's ``*ForCausalLM`` model.
        suppressed: Token ids that are never drawn; see `suppressed_ids`.
        prefix_tree: Compute shared prefixes once, where the family and its attention can.
    """

    def __init__(self, model: PreTrainedModel, suppressed: list[int], *, prefix_tree: bool = True) -> None:
        super().__init__(model, prefix_tree)
        self.suppressed = suppressed

    def forward(
        self,
        batch: PrefixTreeBatch | PaddedBatch,
        rows_A: Tensor,
        columns_A: Tensor,
        drawn_A: Tensor,
        temperature: float,
        entropy_gradient: bool = False,
    ) -> Drawn:
        """Log-probabilities of drawn tokens, and entropies. Call the module, not this method, so ZeRO's hooks run.

        Args:
            batch: The rollouts, which may lack their last token.
            rows_A: The rollout of each action, int64 ``[A]``.
            columns_A: The index in it of the token before the one that was drawn, int64 ``[A]``.
            drawn_A: The id of the token that was drawn, int64 ``[A]``.
            temperature: With which it was drawn.
            entropy_gradient: Whether the entropies carry a gradient, which costs memory.
        """
        hidden_AD = self.hidden(batch)[batch.tokens_SL[rows_A, columns_A]]
        logits_AV = sampling_logits(self._logits(hidden_AD), temperature, self.suppressed)
        log_normalizers_A = logits_AV.logsumexp(-1)
        log_probs_A = logits_AV.gather(1, drawn_A[:, None])[:, 0] - log_normalizers_A
        with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
            probs_AV = (logits_AV - log_normalizers_A[:, None]).exp()
            entropies_A = log_normalizers_A - (probs_AV * logits_AV).sum(-1)
        return Drawn(log_probs_A, entropies_A)

    def _logits(self, hidden_AD: Tensor) -> Tensor:
        logits_AV = self.model.get_output_embeddings()(hidden_AD).float()
        softcap = getattr(self.model.config, "final_logit_softcapping", None)  # of Gemma2
        return logits_AV if softcap is None else softcap * torch.tanh(logits_AV / softcap)


def sampling_logits(logits_AV: Tensor, temperature: float, suppressed: list[int]) -> Tensor:
    """The logits of the distribution that tokens are drawn from, fp32 ``[A, V]``.

    Nothing but a temperature and ids that are never drawn: a distribution that was cut (top-k, top-p) gives drawn
    tokens other probabilities than the policy that is fitted.
    """
    logits_AV = logits_AV.float() / temperature
    return logits_AV.index_fill(1, torch.tensor(suppressed, device=logits_AV.device, dtype=torch.int64), NEVER_DRAWN)


def suppressed_ids(tokenizer: PreTrainedTokenizerBase, rows: int) -> list[int]:
    """The ids that a policy must not draw: the pad token, and rows of the output layer that no token has."""
    return sorted({int(tokenizer.pad_token_id), *range(len(tokenizer), rows)})


def create_policy(
    options: BodyConfig, tokenizer: PreTrainedTokenizerBase, ds_config: dict[str, Any] | None = None
) -> Policy:
    """Builds a policy from a base model, its vocabulary padded as a critic's, without dropout.

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
        dtype=DTYPE_OF[options.dtype],
        attn_implementation=None if options.attn_implementation == "auto" else options.attn_implementation,
    )
    policy = Policy(
        model, suppressed_ids(tokenizer, model.config.get_text_config().vocab_size), prefix_tree=options.prefix_tree
    )
    if options.freeze_layers:
        freeze_first_layers(policy, options.freeze_layers)
    return policy
