"""Computes advantages and losses with verl's own formulas.

Request: padded ``rewards``, ``values``, ``returns``, ``old_values``, ``new_values``, ``log_probs``, ``old_log_probs``,
``advantages`` and ``mask``, one row a rollout; ``groups``, ``gamma``, ``lambdas``, and the limits of the ratio.
"""

import json
import sys

import numpy as np
import torch
from verl.trainer.ppo import core_algos
from verl.workers.config import ActorConfig

with open(sys.argv[1], encoding="utf-8") as file:
    request = json.load(file)
names = ("rewards", "values", "returns", "old_values", "new_values", "log_probs", "old_log_probs", "advantages")
given = {name: torch.tensor(request[name]) for name in names}
mask = torch.tensor(request["mask"]).float()
groups = np.array(request["groups"])
answer = {}
for gae_lambda in request["lambdas"]:
    whitened, returns = core_algos.compute_gae_advantage_return(
        given["rewards"], given["values"], mask, request["gamma"], gae_lambda
    )
    answer[f"returns {gae_lambda}"] = (returns * mask).tolist()
    answer[f"advantages {gae_lambda}"] = ((returns - given["values"]) * mask).tolist()
answer["grpo"] = core_algos.compute_grpo_outcome_advantage(given["rewards"].clone(), mask, groups)[0].tolist()
answer["rloo"] = core_algos.compute_rloo_outcome_advantage(given["rewards"].clone(), mask, groups)[0].tolist()
for mean in ("token-mean", "seq-mean-token-mean"):
    config = ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        clip_ratio=request["clip"],
        clip_ratio_low=request["clip"],
        clip_ratio_high=request["clip_high"],
        clip_ratio_c=request["dual_clip"],
    )
    loss, _ = core_algos.compute_policy_loss_vanilla(
        given["old_log_probs"], given["log_probs"], given["advantages"], mask, mean, config
    )
    answer[f"policy loss {mean}"] = loss.item()
    loss, clipped = core_algos.compute_value_loss(
        given["new_values"], given["returns"], given["old_values"], mask, request["value_clip"], mean
    )
    answer[f"value loss {mean}"] = loss.item()
answer["value clip fraction"] = clipped.item()
with open(sys.argv[2], "w", encoding="utf-8") as file:
    json.dump(answer, file)
