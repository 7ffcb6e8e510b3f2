"""Log-probabilities and entropies of a policy: of the package, and of a slow loop from the definition."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from rlhf_critic.algorithms.response_tokens import ResponseTokens
from rlhf_critic.model.factory import silence_dropout
from rlhf_critic.model.policy import Drawn, Policy


def judge(
    policy: Policy,
    sequences: list[list[int]],
    prompt_lengths: list[int],
    temperature: float = 1.0,
    entropy_gradient: bool = False,
) -> Drawn:
    """What a policy says of all actions, in one batch without the last tokens."""
    actions = ResponseTokens.of(sequences, prompt_lengths)
    columns = (torch.from_numpy(column) for column in (*actions.places, actions.drawn_A))
    return policy(policy.batch_of([ids[:-1] for ids in sequences]), *columns, temperature, entropy_gradient)


def plain_policy(source: str) -> PreTrainedModel:
    config = AutoModelForCausalLM.from_pretrained(source).config
    silence_dropout(config)
    return AutoModelForCausalLM.from_pretrained(source, config=config).train()


def from_the_definition(
    model: PreTrainedModel,
    sequences: list[list[int]],
    prompt_lengths: list[int],
    temperature: float,
    suppressed: list[int],
) -> Drawn:
    """The log-probability of each action and the entropy there, one sequence at a time, float64."""
    log_probs, entropies = [], []
    for ids, prompt_length in zip(sequences, prompt_lengths, strict=True):
        logits_LV = model(torch.tensor([ids])).logits[0].double() / temperature
        kept = torch.tensor([token for token in range(logits_LV.shape[1]) if token not in suppressed])
        for logits_V, drawn in zip(logits_LV[prompt_length - 1 : -1, kept], ids[prompt_length:], strict=True):
            weights_V = (logits_V - logits_V.max().detach()).exp()
            probs_V = weights_V / weights_V.sum()
            log_probs.append(probs_V[kept == drawn].log()[0])
            entropies.append(-(probs_V * probs_V.log()).sum())
    return Drawn(torch.stack(log_probs), torch.stack(entropies))
