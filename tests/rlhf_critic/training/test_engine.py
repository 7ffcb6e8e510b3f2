"""A step waits for the device only where it must, steps prepared ahead are the same, and probes change nothing.

The functions above the tests are sent to real ranks (Ray actors) and run there.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import wraps

import pytest
import torch

from rlhf_critic.batching import device_copy
from rlhf_critic.training.critic_engine import CriticEngine
from tests.helpers import slow_except
from tests.rlhf_critic.training.critic_runs import make, rows_of, train, whole_weights

STEPS = 4


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


def same_weights(one: CriticEngine, other: CriticEngine) -> bool:
    weights, others = whole_weights(one), whole_weights(other)
    return weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)


def prepare_ahead(source: str, data: str, cache: str, stage: int) -> tuple[list[dict], list[dict], bool]:
    """Returns metrics of steps prepared on demand and of steps prepared by a thread, and whether weights are equal."""
    engine, preferences, _ = make(source, data, cache, stage)
    expected = train(engine, preferences, STEPS)
    other, preferences, _ = make(source, data, cache, stage)
    found = []
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(other.prepare, preferences, rows_of(preferences, 0))
        for step in range(STEPS):
            prepared = following.result(60)
            following = thread.submit(other.prepare, preferences, rows_of(preferences, step + 1))
            found.append(asdict(other.take_step(prepared)))
    return expected, found, same_weights(engine, other)


@pytest.mark.parametrize("stage", slow_except([2], [0, 2, 3]))
def test_steps_prepared_ahead_are_the_same_to_the_bit(ranks, tiny_model, preference_file, cache, stage):
    for expected, found, same in ranks(2).run(prepare_ahead, tiny_model, preference_file, cache, stage):
        assert found == expected
        assert same


def record_order(source: str, data: str, cache: str, stage: int) -> tuple[list[str], int]:
    """Returns the backward passes, host reads and optimizer steps of a step in their order, and its micro-batches."""
    engine, preferences, _ = make(source, data, cache, stage)
    train(engine, preferences, 1)
    events: list[str] = []

    def recorded(owner: object, name: str) -> None:
        real = getattr(owner, name)

        @wraps(real)
        def call(*arguments, **options):
            events.append(name)
            return real(*arguments, **options)

        setattr(owner, name, call)

    read = device_copy.HostCopy.read
    recorded(engine.training.engine, "backward")
    recorded(engine.training.engine, "step")
    recorded(device_copy.HostCopy, "read")
    try:
        metrics = engine.train_step(preferences, rows_of(preferences, 1))
    finally:
        device_copy.HostCopy.read = read
    return events, metrics.micro_batches


@pytest.mark.parametrize(("stage", "world_size"), slow_except([(2, 2)], [(0, 1), (2, 2), (3, 2)]))
def test_the_loss_is_read_after_all_backward_passes_were_queued(
    ranks, tiny_model, preference_file, cache, stage, world_size
):
    for events, micro_batches in ranks(world_size).run(record_order, tiny_model, preference_file, cache, stage):
        assert micro_batches > 1
        assert events == ["backward", "step"] * (micro_batches - 1) + ["backward", "read", "step"]


def probe_and_train(source: str, data: str, cache: str, stage: int) -> tuple[bool, list[dict], list[dict]]:
    """Runs the pass that a probe on a GPU measures, then trains; returns the metrics beside those without a probe."""
    engine, preferences, _ = make(source, data, cache, stage)
    for _ in range(2):
        engine.training._run_probe(engine.training._probe_batch(128, 64))
    clean = stage == 3 or all(parameter.grad is None for parameter in engine.critic.parameters())
    other, preferences, _ = make(source, data, cache, stage)
    return clean, train(engine, preferences, STEPS), train(other, preferences, STEPS)


@pytest.mark.parametrize(("stage", "world_size"), slow_except([(0, 1), (3, 2)], [(0, 1), (2, 2), (3, 2)]))
def test_the_probe_for_gpus_changes_no_step(ranks, tiny_model, preference_file, cache, stage, world_size):
    for clean, found, expected in ranks(world_size).run(probe_and_train, tiny_model, preference_file, cache, stage):
        assert clean
        assert found == expected


def count_steps(source: str, data: str, cache: str) -> tuple[set[float], bool]:
    """Takes a step in bf16 at stage 0; returns AdamW's own counts, and if the weights were its masters before."""
    engine, preferences, _ = make(source, data, cache, 0, "bfloat16")
    optimizer = engine.training.engine.optimizer
    before = {name: parameter.detach().clone() for name, parameter in engine.critic.named_parameters()}
    fresh, *_ = make(source, data, cache, 1, "bfloat16")  # stage 1 takes no step of its own
    same = all(torch.equal(before[name], parameter) for name, parameter in fresh.critic.named_parameters())
    train(engine, preferences, 1)
    return {float(state["step"]) for state in optimizer.optimizer.state.values()}, same


def test_training_in_bf16_at_stage_0_starts_with_its_first_step(ranks, tiny_model, preference_file, cache):
    assert ranks(1).run(count_steps, tiny_model, preference_file, cache) == [({1.0}, True)]
