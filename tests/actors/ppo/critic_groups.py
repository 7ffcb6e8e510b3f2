"""Options, groups and plain values for tests of the online critic."""

import numpy as np
import torch

from actors.ppo.critic_group import CriticGroup, CriticOptions
from rlhf_critic.config.model import EncodingConfig, ModelConfig
from rlhf_critic.config.train import TrainConfig
from rlhf_critic.model.critic import Critic
from tests.actors.groups import CPUS, make_rollouts

STEPS = 10
CLIP = 0.5
TOLERANCE = 1e-5
MAX_LENGTH = 64
ROLLOUTS = make_rollouts(prompts=6)


def options_of(path: str, stage: int, total_steps: int = STEPS, **changes: object) -> CriticOptions:
    settings = {
        "learning_rate": 3e-3,
        "schedule": "linear",
        "warmup_fraction": 0.2,
        "weight_decay": 0.01,
        "token_budget": 150,
        **changes,
    }
    return CriticOptions(
        ModelConfig(path=path),
        TrainConfig(zero_stage=stage, **settings),
        EncodingConfig(max_length=MAX_LENGTH),
        total_steps,
    )


def make(path: str, shards: int, stage: int, **changes: object) -> CriticGroup:
    return CriticGroup(options_of(path, stage, **changes), shards, cpus_per_shard=CPUS, start_timeout_s=200)


def alone(critic: Critic, sequences: list[list[int]]) -> list[np.ndarray]:
    """Returns the values of each sequence, computed separately in this process."""
    with torch.no_grad():
        return [critic.values(critic.batch_of([ids]))[0].numpy() for ids in sequences]


def assert_values(found: list[np.ndarray], wanted: list[np.ndarray]) -> None:
    assert [len(values) for values in found] == [len(values) for values in wanted]
    assert all(values.dtype == np.float32 for values in found)
    np.testing.assert_allclose(np.concatenate(found), np.concatenate(wanted), rtol=0, atol=TOLERANCE)
