"""A plain PPO loop: the policy is a transformers model here, the critic is a `CriticGroup` on Ray. Reads top to bottom.

    python docs/examples/ppo_loop.py MODEL my-value-critic

Shape legend: S rollouts, L tokens of the longest response.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from actors import CriticGroup, CriticOptions
from rlhf_critic import load_tokenizer
from rlhf_critic.algorithms import gae, ppo
from rlhf_critic.algorithms.ppo_losses import clipped_policy_loss
from rlhf_critic.config.model import ModelConfig
from rlhf_critic.config.train import TrainConfig

PROMPT, SAMPLES, TOKENS = "please explain", 32, 12


def main(model: str, out: str, reward: Callable[[str], float] = lambda text: text.count("!"), steps: int = 20) -> float:
    """Trains a policy on a reward of texts; saves the critic and returns the last mean reward."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer(model, "plain")
    policy = AutoModelForCausalLM.from_pretrained(model)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
    prompt = tokenizer(PROMPT, return_tensors="pt")
    length = prompt["input_ids"].shape[1]
    options = CriticOptions(ModelConfig(path=model), TrainConfig(learning_rate=1e-3), total_steps=steps)
    with CriticGroup(options, shards=1, cpus_per_shard=0.5) as critic:
        for _ in range(steps):
            # 1. Sample responses, which end with EOS or at the limit.
            drawn = policy.generate(
                **prompt, do_sample=True, top_k=0, max_new_tokens=TOKENS, num_return_sequences=SAMPLES
            )
            ended_SL = (drawn[:, length:] == tokenizer.eos_token_id).cumsum(1)
            mask_SL = (ended_SL == 0) | ((ended_SL == 1) & (drawn[:, length:] == tokenizer.eos_token_id))
            sequences = [row[: length + int(mask.sum())].numpy() for row, mask in zip(drawn, mask_SL, strict=True)]
            texts = tokenizer.batch_decode(drawn[:, length:], skip_special_tokens=True)
            rewards_S = torch.tensor([float(reward(text)) for text in texts])
            # 2. Values of the actions; the prompt is computed once for all samples.
            values, last_values_S = ppo.action_values(critic.values(sequences), [length] * SAMPLES)
            values_SL = torch.nn.functional.pad(ppo.pad_rows(values)[0], (0, mask_SL.shape[1] - max(map(len, values))))
            # 3. Advantages with lambda 0.95, returns with lambda 1.
            rewards_SL = ppo.shaped_rewards(rewards_S, torch.zeros(mask_SL.shape), mask_SL, 0.0)
            ends = torch.from_numpy(last_values_S), torch.zeros(SAMPLES, dtype=torch.bool)
            advantages_SL, returns_SL = gae.decoupled_gae(rewards_SL, values_SL, mask_SL, *ends, 1.0, 0.95)
            # 4. One step of the critic, one of the policy.
            critic.update(sequences, [length] * SAMPLES, ppo.unpad_rows(returns_SL, mask_SL), values, clip=None)
            logits = policy(drawn).logits[:, length - 1 : -1].log_softmax(-1)
            log_probs_SL = logits.gather(2, drawn[:, length:, None])[..., 0]
            loss_SL, _ = clipped_policy_loss(
                log_probs_SL, log_probs_SL.detach(), ppo.whiten(advantages_SL, mask_SL), 0.2
            )
            ppo.masked_mean(loss_SL, mask_SL).backward()
            optimizer.step()
            optimizer.zero_grad()
            print(f"reward {rewards_S.mean():.2f}, value {np.mean(np.concatenate(values)):.2f}")
        critic.save(out)
    return float(rewards_S.mean())


if __name__ == "__main__":
    main(*sys.argv[1:3])
