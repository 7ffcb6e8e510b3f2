"""One iteration of PPO, phase by phase, in one process: with prefix trees, or with padded batches of the same engines.

Padded batches are sorted by length. Both use the same weights, rollouts and numbers. A first call of every phase warms
up.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.harness import Result, Specification, contender
from benchmarks.workloads import PROFILES, draw_prompts
from rlhf_critic.algorithms.ppo import action_values
from rlhf_critic.config.model import BodyConfig, ModelConfig, OptimizerConfig
from rlhf_critic.config.train import TrainConfig
from rlhf_critic.data.encoding import Encoder, load_tokenizer
from rlhf_critic.model.generation import TransformersGenerator
from rlhf_critic.training.critic_engine import CriticEngine
from rlhf_critic.training.policy_engine import PolicyEngine
from rlhf_critic.training.process_group import init_distributed

TEMPERATURE = 1.0


def run(specification: Specification) -> Result:
    """Measures the seconds of each phase, and returns values and losses, which must be equal for both contenders."""
    os.environ["LOCAL_RANK"] = "0"  # DeepSpeed requires it
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    init_distributed("gloo")
    tokenizer = load_tokenizer(specification["model"])
    model = {"path": specification["model"], "prefix_tree": specification["prefix_tree"]}
    budget: dict[str, Any] = {"zero_stage": 0, "token_budget": specification["token_budget"], "learning_rate": 1e-6}
    critic = CriticEngine.from_pretrained(
        Encoder(tokenizer, max_length=4096), ModelConfig(**model), TrainConfig(**budget), total_steps=1000
    )
    profile = PROFILES[specification["profile"]]
    sampled = draw_prompts(profile, specification["prompts"], specification["n"])
    sequences = [ids for responses in sampled for ids in responses]
    prompt_lengths = [
        _shared(responses) if len(responses) > 1 else max(1, len(responses[0]) - int(profile.response.median))
        for responses in sampled
        for _ in responses
    ]
    seconds: dict[str, float] = {}

    def phase(name: str, action: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        result = action()
        seconds[name] = time.perf_counter() - started
        return result

    critic.values(sequences[: specification["n"]])
    values = phase("values", lambda: critic.values(sequences))
    computed_tokens = critic.computed_tokens
    old_values, _ = action_values(values, prompt_lengths)
    draws = np.random.default_rng(0)
    returns = [numbers + draws.normal(size=len(numbers)).astype(np.float32) for numbers in old_values]
    some = slice(0, specification["n"])
    critic.update(sequences[some], prompt_lengths[some], returns[some], old_values[some], 0.2)
    updated = phase("update critic", lambda: critic.update(sequences, prompt_lengths, returns, old_values, 0.2))
    result: Result = {
        "values": [float(numbers[-1]) for numbers in values],
        "loss": updated.loss,
        "tokens": updated.tokens,
        "computed_tokens": computed_tokens,
    }
    if specification["all_phases"]:
        phase("score", lambda: critic.rewards(sequences))
        del critic
        policy = PolicyEngine(tokenizer, BodyConfig(**model), OptimizerConfig(**budget), 1000, 0, TEMPERATURE)
        log_probs = policy.reference_log_probs(sequences, prompt_lengths)
        advantages = [np.ones_like(numbers) for numbers in log_probs]
        policy.update(sequences[some], prompt_lengths[some], log_probs[some], advantages[some], 0.2)
        phase("update policy", lambda: policy.update(sequences, prompt_lengths, log_probs, advantages, 0.2))
        del policy
        generator = TransformersGenerator(BodyConfig(**model), tokenizer, TEMPERATURE, torch.device("cpu"))
        prompts = [ids[:length] for ids, length in zip(sequences, prompt_lengths, strict=True)]
        batches = [prompts[start : start + 32] for start in range(0, len(prompts), 32)]
        most = int(profile.response.median)
        phase("generate", lambda: [generator.generate(batch, most, seed) for seed, batch in enumerate(batches)])
    return {**result, "seconds": seconds, "fit_seconds": seconds["values"] + seconds["update critic"]}


def _shared(responses: list[np.ndarray]) -> int:
    """Returns the number of tokens that all responses share: the prompt."""
    shortest = min(len(ids) for ids in responses)
    same = np.all([ids[:shortest] == responses[0][:shortest] for ids in responses], axis=0)
    return int(same.argmin()) if not same.all() else shortest - 1


if __name__ == "__main__":
    contender(run)
