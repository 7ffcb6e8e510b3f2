"""What a resumed run may change."""

import pytest

from actors.training.worker import changed_options, is_due, total_steps
from rlhf_critic.config.train import TrainConfig, TrainJobConfig
from rlhf_critic.errors import ConfigError

OPTIONS = {"model": {"path": "m"}, "data": {"train": "d"}, "train": {"learning_rate": 1e-3}}


def changed(**sections: dict) -> list[str]:
    now = {name: {**OPTIONS.get(name, {}), **sections.get(name, {})} for name in {*OPTIONS, *sections}}
    return changed_options(TrainJobConfig.model_validate(OPTIONS), TrainJobConfig.model_validate(now))


def test_options_that_decide_the_weights_are_named():
    assert changed() == []
    assert changed(train={"learning_rate": 2e-3, "seed": 1}, model={"num_layers": 3}) == [
        "model.num_layers: None -> 3",
        "train.learning_rate: 0.001 -> 0.002",
        "train.seed: 0 -> 1",
    ]


def test_paths_speed_and_how_often_something_is_kept_may_change():
    assert changed(model={"path": "elsewhere"}, data={"train": "moved"}, run={"max_failures": 0}) == []
    assert changed(train={"token_budget": 1, "validate_every": 3, "checkpoint_every": 4}) == []


def test_steps_and_what_is_due():
    assert total_steps(10, TrainConfig(global_batch_size=4, epochs=2)) == 5
    assert total_steps(10, TrainConfig(global_batch_size=4, epochs=2, max_steps=3)) == 3
    with pytest.raises(ConfigError, match="shows none"):
        total_steps(10, TrainConfig(epochs=0.01))
    assert [step for step in range(1, 7) if is_due(step, 3)] == [3, 6]
    assert not any(is_due(step, 0) for step in range(1, 7))
