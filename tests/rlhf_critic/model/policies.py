"""Log-probabilities and entropies of a policy, from the package and from a slow loop by definition."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from rlhf_critic.algorithms.response_tokens import ResponseTokens
from rlhf_critic.model.hf_config import silence_dropout
from rlhf_critic.model.policy import Policy, SampledTokenStats


def token_stats(
    policy: Policy,
    sequences: list[list[int]],
    prompt_lengths: list[int],
    temperature: float = 1.0,
    entropy_gradient: bool = False,
) -> SampledTokenStats:
    """Computes the statistics of all response tokens, in one batch without the last tokens."""
    actions = ResponseTokens.of(sequences, prompt_lengths)
    columns = (torch.from_numpy(column) for column in (*actions.places, actions.drawn_A))
    return policy(policy.batch_of([ids[:-1] for ids in sequences]), *columns, temperature, entropy_gradient)


def plain_policy(source: str) -> PreTrainedModel:
    config = AutoModelForCausalLM.from_pretrained(source).config
    silence_dropout(config)
    return AutoModelForCausalLM.from_pretrained(source, config=config).eval()


def from_the_definition(
    model: PreTrainedModel,
    sequences: list[list[int]],
    prompt_lengths: list[int],
    temperature: float,
    suppressed: list[int],
) -> SampledTokenStats:
    """Computes log-probabilities and entropies from the definition, one sequence at a time, in float64."""
    log_probs, entropies = [], []
    for ids, prompt_length in zip(sequences, prompt_lengths, strict=True):
        logits_LV = model(torch.tensor([ids])).logits[0].double() / temperature
        kept = torch.tensor([token for token in range(logits_LV.shape[1]) if token not in suppressed])
        for logits_V, drawn in zip(logits_LV[prompt_length - 1 : -1, kept], ids[prompt_length:], strict=True):
            weights_V = (logits_V - logits_V.max().detach()).exp()
            probs_V = weights_V / weights_V.sum()
            log_probs.append(probs_V[kept == drawn].log()[0])
            entropies.append(-(probs_V * probs_V.log()).sum())
    return SampledTokenStats(torch.stack(log_probs), torch.stack(entropies))
