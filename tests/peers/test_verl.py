"""verl's reward loop gets our rewards from a pool that it takes for a vLLM server; its formulas give our numbers."""

import numpy as np
import pytest
import torch

from rlhf_critic.algorithms.gae import gae, group_advantages
from rlhf_critic.algorithms.ppo_losses import clipped_policy_loss, clipped_value_loss, token_weights
from tests.actors.scorers import rewards_by_engine


def test_their_reward_loop_gets_our_rewards_over_http(peer, serving, exports, base, conversations):
    contract = peer("verl")
    for number, critic in enumerate(exports):
        url = serving(critic, max_replicas=1)
        request = {
            "address": url.removeprefix("http://"),
            "model": exports[0],  # after a publish the trainer still names what it was started with
            "policy": base,
            "prompts": [[{"role": "user", "content": str(one.prompt)}] for one in conversations],
            "responses": [one.response for one in conversations],
        }
        answer = contract.run("ask_verl", request)
        ours = rewards_by_engine(critic, conversations)
        when = "after a publish" if number else "before a publish"
        contract.compare(f"our /classify: RewardLoopWorker.compute_score_disrm, {when}", answer["scores"], ours)


LIMITS = {"clip": 0.2, "clip_high": 0.28, "dual_clip": 3.0, "value_clip": 0.3}


@pytest.fixture
def rollouts() -> dict[str, torch.Tensor]:
    """Numbers of eight rollouts of two prompts, whose masks have holes, as of the output of a tool."""
    generator = torch.Generator().manual_seed(0)
    names = ("rewards", "values", "returns", "old_values", "new_values", "log_probs", "old_log_probs", "advantages")
    numbers = {name: torch.randn(8, 12, generator=generator) for name in names}
    mask = torch.rand(8, 12, generator=generator) < 0.7
    mask[:, 0] = True
    numbers["rewards"] = numbers["rewards"] * mask
    return {**numbers, "mask": mask}


def mean_loss(loss: torch.Tensor, mask: torch.Tensor, mean: str) -> float:
    counts = mask.sum(1).tolist()
    weights = torch.tensor(token_weights(counts, mean) or [1.0] * len(counts))
    return ((loss * mask).sum(1) * weights).sum().item() / sum(counts)


def test_their_formulas_give_our_numbers(peer, rollouts):
    contract = peer("verl")
    groups, gamma, lambdas = [0, 0, 0, 1, 1, 1, 1, 1], 0.97, [0.0, 0.95, 1.0]
    request = {name: tensor.tolist() for name, tensor in rollouts.items()}
    answer = contract.run(
        "ask_verl_formulas", {**request, **LIMITS, "groups": groups, "gamma": gamma, "lambdas": lambdas}
    )
    mask = rollouts["mask"]
    ends = torch.zeros(8), torch.zeros(8, dtype=torch.bool)
    for gae_lambda in lambdas:
        advantages, returns = gae(rollouts["rewards"], rollouts["values"], mask, *ends, gamma, gae_lambda)
        for name, ours in (("advantages", advantages), ("returns", returns)):
            contract.compare(
                f"GAE with holes, lambda {gae_lambda}: {name}", answer[f"{name} {gae_lambda}"], ours.numpy()
            )
    for kind in ("grpo", "rloo"):
        ours = group_advantages(rollouts["rewards"].sum(1), np.array(groups), kind)[:, None] * mask
        contract.compare(f"baseline of groups: {kind}", answer[kind], ours.numpy())
    ratio = rollouts["log_probs"], rollouts["old_log_probs"], rollouts["advantages"]
    policy_loss, _ = clipped_policy_loss(*ratio, LIMITS["clip"], LIMITS["clip_high"], LIMITS["dual_clip"])
    value_loss, clipped = clipped_value_loss(
        rollouts["new_values"], rollouts["old_values"], rollouts["returns"], LIMITS["value_clip"]
    )
    for mean, theirs in (("token", "token-mean"), ("sequence", "seq-mean-token-mean")):
        for name, loss in (("policy", policy_loss), ("value", value_loss)):
            contract.compare(f"{name} loss, {mean} mean", answer[f"{name} loss {theirs}"], mean_loss(loss, mask, mean))
    ours = (clipped & mask).sum().item() / mask.sum().item()
    contract.compare("fraction of clipped values", answer["value clip fraction"], ours)
