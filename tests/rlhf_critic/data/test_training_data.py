"""The data of a run: its number of steps, and the mixture of its sources."""

import json

import numpy as np
import pytest

from rlhf_critic.batching.sampler import is_due
from rlhf_critic.config.train import DataConfig, TrainConfig, TrainJobConfig
from rlhf_critic.data.preference_dataset import temperature_weights
from rlhf_critic.data.training_data import load_data, total_steps
from rlhf_critic.errors import ConfigError


def test_steps_and_what_is_due():
    assert total_steps(10, TrainConfig(global_batch_size=4, epochs=2)) == 5
    assert total_steps(10, TrainConfig(global_batch_size=4, epochs=2, max_steps=3)) == 3
    with pytest.raises(ConfigError, match="that is no step"):
        total_steps(10, TrainConfig(epochs=0.01))
    assert [step for step in range(1, 7) if is_due(step, 3)] == [3, 6]
    assert not any(is_due(step, 0) for step in range(1, 7))


@pytest.mark.parametrize("temperature", [0.01, 0.7, 1.0, 2.0, 3.3, 1e6])
def test_shares_of_sources_are_those_of_the_formula(temperature):
    rng = np.random.default_rng(0)
    for _ in range(50):
        sizes = [int(size) for size in 10 ** rng.uniform(0, 7, rng.integers(1, 8))]
        weights = temperature_weights(sizes, temperature)
        rows = [weight * size for weight, size in zip(weights, sizes, strict=True)]
        np.testing.assert_allclose(rows, np.round(rows), atol=1e-6)
        assert round(sum(rows)) == sum(sizes), "an epoch keeps its length"
        largest = max(sizes)
        powers = [(size / largest) ** (1 / temperature) for size in sizes]
        for power, drawn in zip(powers, rows, strict=True):
            assert abs(drawn - power / sum(powers) * sum(sizes)) < 1 + 1e-6
    assert temperature_weights(sizes, 1.0) == [1.0] * len(sizes)


def test_an_empty_source_has_no_share():
    assert temperature_weights([0, 5, 3], 100.0) == [0.0, 0.8, 4 / 3]


def test_sources_are_mixed_by_temperature(tokenizer_dir, tmp_path):
    def load(**options):
        data = {"train": sources, "cache_dir": str(tmp_path / "cache"), **options}
        config = {"model": {"path": tokenizer_dir()}, "data": data, "encoding": {"max_length": 64}}
        return load_data(TrainJobConfig.model_validate(config))

    sources = []
    for name, size in (("large", 90), ("small", 10)):
        rows = [{"prompt": f"{name} {n}", "chosen": "of course", "rejected": "no"} for n in range(size)]
        sources.append(str(tmp_path / f"{name}.jsonl"))
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plain, same, mixed = load(), load(mixing_temperature=1), load(mixing_temperature=2)
    assert plain.train.fingerprint == same.train.fingerprint
    assert f"rows of an epoch: 75 of {sources[0]}, 25 of {sources[1]}" in str(mixed)  # 9 to 1 becomes 3 to 1
    assert len(mixed.train) == 100
    times = np.unique([mixed.train.origin(row) for row in range(100)], return_counts=True)[1]
    assert sorted(times.tolist()) == [1] * 75 + [2] * 5 + [3] * 5
    held_out = load(mixing_temperature=2, validation_fraction=0.1)
    assert len(held_out.train) == 90
    with pytest.raises(ValueError, match=r"train_weights and data\.mixing_temperature exclude each other"):
        DataConfig(train=("a", "b"), train_weights=(1, 2), mixing_temperature=2)
