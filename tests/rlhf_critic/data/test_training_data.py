"""The number of steps of a run."""

import pytest

from rlhf_critic.batching.sampler import is_due
from rlhf_critic.config.train import TrainConfig
from rlhf_critic.data.training_data import total_steps
from rlhf_critic.errors import ConfigError


def test_steps_and_what_is_due():
    assert total_steps(10, TrainConfig(global_batch_size=4, epochs=2)) == 5
    assert total_steps(10, TrainConfig(global_batch_size=4, epochs=2, max_steps=3)) == 3
    with pytest.raises(ConfigError, match="that is no step"):
        total_steps(10, TrainConfig(epochs=0.01))
    assert [step for step in range(1, 7) if is_due(step, 3)] == [3, 6]
    assert not any(is_due(step, 0) for step in range(1, 7))
