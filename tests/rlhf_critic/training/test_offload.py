"""An offloaded engine holds no memory, and restoring it changes no number.

The functions are sent to real ranks (Ray actors) and run there.
"""

import ctypes
import gc
import itertools
import os
import resource
from dataclasses import asdict
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import psutil
import pytest
import torch
from torch import nn

from rlhf_critic.batching.sampler import DataOrder
from rlhf_critic.config.model import ModelConfig
from rlhf_critic.config.train import TrainConfig
from rlhf_critic.data.encoding import Encoder, load_tokenizer
from rlhf_critic.data.preference_dataset import EncodedPreferences
from rlhf_critic.data.preferences import load_preferences
from rlhf_critic.errors import CriticError
from rlhf_critic.training.critic_engine import CriticEngine
from rlhf_critic.training.offload import MIN_BYTES, Offloaded
from tests.helpers import save_tiny_model, slow_except

STEPS = 5
RANKS_AND_STAGES = slow_except([(1, 0), (2, 3)], [(1, 0), (1, 3), (2, 0), (2, 1), (2, 2), (2, 3)])
SEQUENCES = [[5, 6, 7, 8], [5, 6, 9], [10, 11, 12, 13, 14, 15]]


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def large_model(tmp_path_factory) -> str:
    """A model of about 13 million parameters, so that the freed memory exceeds other changes in the process."""
    directory = tmp_path_factory.mktemp("models") / "large"
    return save_tiny_model(directory, tie_word_embeddings=False, hidden_size=640, intermediate_size=2560)


def make(source: str, data: str, cache: str, stage: int, dtype: str) -> tuple[CriticEngine, EncodedPreferences]:
    encoder = Encoder(load_tokenizer(source), max_length=64)
    options = TrainConfig(global_batch_size=12, learning_rate=3e-3, token_budget=150, zero_stage=stage)
    engine = CriticEngine.from_pretrained(encoder, ModelConfig(path=source, dtype=dtype), options, STEPS)
    return engine, load_preferences(data, encoder, cache)


def step(engine: CriticEngine, preferences: EncodedPreferences) -> dict[str, Any]:
    rows = DataOrder(preferences.prompts_N, 0).rows_of_step(12, engine.step, 10.0)
    return asdict(engine.train_step(preferences, rows))


def held_tensors(engine: CriticEngine) -> list[torch.Tensor]:
    """Returns this rank's parameters and moments."""
    parameters = [getattr(parameter, "ds_tensor", parameter) for parameter in engine.critic.parameters()]
    optimizer = engine._engine.optimizer  # at stage 0 in fp32 ours, else DeepSpeed's around ours
    states = getattr(optimizer, "optimizer", optimizer).state.values()
    return parameters + [state[name] for state in states for name in ("exp_avg", "exp_avg_sq")]


def memory() -> int:
    """Returns the RAM of this process in bytes, after freeing garbage and malloc's free memory."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return psutil.Process().memory_info().rss


def measure(source: str, data: str, cache: str, stage: int) -> dict[str, Any]:
    engine, preferences = make(source, data, cache, stage, "float32")
    step(engine, preferences)  # creates the optimizer state
    parameters = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in engine.critic.parameters())
    large = [tensor for tensor in held_tensors(engine) if tensor.untyped_storage().nbytes() >= MIN_BYTES]
    before = memory()
    offloaded = Offloaded(engine._engine)
    rss = psutil.Process().memory_info().rss
    left = sum(tensor.untyped_storage().nbytes() for tensor in large)
    shapes = [tensor.shape for tensor in large]
    offloaded.restore()
    return {
        "parameters": parameters,
        "bytes": offloaded.bytes,
        "freed": before - rss,
        "left": left,
        "large": sum(tensor.nbytes for tensor in large),
        "same shapes": shapes == [tensor.shape for tensor in large],
        "back": memory() - rss,
    }


@pytest.mark.parametrize(("world_size", "stage"), RANKS_AND_STAGES)
def test_the_memory_of_parameters_and_optimizer_goes_and_comes(
    ranks, large_model, preference_file, cache, stage, world_size
):
    for measured in ranks(world_size).run(measure, large_model, preference_file, cache, stage):
        whole = 4 * measured["parameters"]
        # parameters and two moments; from stage 1 on also the optimizer's copy of the parameters
        held = {0: 3 * whole, 3: 4 * whole / world_size}.get(stage, whole + 3 * whole / world_size)
        assert measured["left"] == 0
        assert measured["same shapes"]
        assert measured["bytes"] >= measured["large"] > 0
        if stage == 3:  # also the gradients and their reduction bucket
            assert measured["bytes"] > 0.99 * held
        else:
            assert measured["bytes"] == pytest.approx(held, rel=0.01)
        assert measured["freed"] > 0.8 * measured["bytes"]
        assert measured["back"] > 0.8 * measured["bytes"]


def run_steps(source: str, data: str, cache: str, stage: int, dtype: str, between: bool) -> tuple[list[dict], list]:
    engine, preferences = make(source, data, cache, stage, dtype)
    metrics = []
    for _ in range(STEPS):
        metrics.append(step(engine, preferences))
        if between:
            Offloaded(engine._engine).restore()
    return metrics, engine.values(SEQUENCES)


@pytest.mark.parametrize("world_size", [2])
@pytest.mark.parametrize(
    ("stage", "dtype"),
    slow_except([(2, "float32"), (3, "bfloat16")], itertools.product((0, 1, 2, 3), ("float32", "bfloat16"))),
)
def test_steps_are_the_same_with_and_without_a_phase_away_between_them(
    ranks, tiny_model, preference_file, cache, stage, world_size, dtype
):
    arguments = (run_steps, tiny_model, preference_file, cache, stage, dtype)
    undisturbed, offloaded = (ranks(world_size).run(*arguments, between) for between in (False, True))
    for (expected_metrics, expected_values), (metrics, values) in zip(undisturbed, offloaded, strict=True):
        assert metrics == expected_metrics
        assert len({step["loss"] for step in metrics}) == STEPS
        for expected, found in zip(expected_values, values, strict=True):
            np.testing.assert_array_equal(found, expected)


def score_around(source: str, data: str, cache: str, stage: int) -> tuple[list, list, str]:
    engine, preferences = make(source, data, cache, stage, "float32")
    step(engine, preferences)
    scored = [(engine.rewards(SEQUENCES), engine.values(SEQUENCES))]
    bits = [[tensor.clone() for tensor in held_tensors(engine)]]
    offloaded = Offloaded(engine._engine)
    with pytest.raises(CriticError) as refused:
        engine.values(SEQUENCES)
    offloaded.restore()
    offloaded.restore()
    scored.append((engine.rewards(SEQUENCES), engine.values(SEQUENCES)))
    bits.append(held_tensors(engine))
    return scored, [torch.equal(*pair) for pair in zip(*bits, strict=True)], str(refused.value)


@pytest.mark.parametrize(("world_size", "stage"), RANKS_AND_STAGES)
def test_scoring_is_refused_while_away_and_the_same_to_the_bit_after(
    ranks, tiny_model, preference_file, cache, stage, world_size
):
    for scored, same, message in ranks(world_size).run(score_around, tiny_model, preference_file, cache, stage):
        (expected_rewards, expected_values), (rewards, values) = scored
        np.testing.assert_array_equal(rewards, expected_rewards)
        for expected, found in zip(expected_values, values, strict=True):
            np.testing.assert_array_equal(found, expected)
        assert len(same) > 20
        assert all(same)
        assert "restore()" in message


def linear_engine(stage: int = 0, trained: bool = True) -> Any:
    """Builds a DeepSpeed engine around a matrix of one megabyte."""
    module = nn.Linear(512, 512, bias=False)
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage}}
    optimizer = torch.optim.AdamW(module.parameters()) if trained else None
    return deepspeed.initialize(model=module, optimizer=optimizer, config=config)[0]


def files_in(directory: str) -> list[int]:
    """Returns the sizes of open files of this process below a directory, including unnamed ones."""
    sizes = []
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            if os.readlink(descriptor).startswith(directory):
                sizes.append(descriptor.stat().st_size)
        except FileNotFoundError:  # the descriptor of this listing
            continue
    return sizes


def watch_files(directory: str) -> list[Any]:
    engine = linear_engine()
    offloaded = Offloaded(engine, directory=directory)
    seen = [offloaded.bytes, files_in(directory), os.listdir(directory)]
    offloaded.restore()
    seen += [files_in(directory)]
    dropped = Offloaded(engine, directory=directory)
    seen += [files_in(directory)]
    del dropped
    gc.collect()
    return [*seen, files_in(directory)]


def test_the_file_has_no_name_and_goes_with_what_it_holds(ranks, tmp_path):
    ((size, away, names, restored, away_again, dropped),) = ranks(1).run(watch_files, str(tmp_path))
    assert size == 4 * 512 * 512  # before the first step there are no moments
    assert away == away_again == [size]
    assert names == restored == dropped == []


def run_out_of_room(directory: str) -> tuple[bool, bool, list[int]]:
    engine = linear_engine()
    weight = engine.module.weight.detach().clone()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            Offloaded(engine, directory=directory)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    same = torch.equal(engine.module.weight, weight)
    gc.collect()
    left = files_in(directory)
    engine(torch.ones(1, 512))
    Offloaded(engine, directory=directory).restore()
    return same, torch.equal(engine.module.weight, weight), left


def test_a_full_disk_leaves_the_engine_as_it_was(ranks, tmp_path):
    assert ranks(1).run(run_out_of_room, str(tmp_path)) == [(True, True, [])]


def count_special(stage: int) -> dict[str, int]:
    bytes_of = {}
    engine = linear_engine()
    extra = torch.ones(1000, dtype=torch.float64)
    offloaded = Offloaded(engine, others=[extra, extra[5:], torch.ones(10)])
    assert extra.untyped_storage().nbytes() == 0
    bytes_of["with another tensor and its view"] = offloaded.bytes
    offloaded.restore()
    assert extra.sum() == 1000

    engine.module.weight.grad = torch.ones(512, 512)
    offloaded = Offloaded(engine)
    bytes_of["with a gradient"] = offloaded.bytes
    offloaded.restore()
    assert engine.module.weight.grad.sum() == 512 * 512

    engine.module.weight.grad = None
    weight = engine.module.weight.detach().numpy()
    offloaded = Offloaded(engine)
    assert (engine.module.weight.detach().numpy() == weight).all()
    bytes_of["shared with numpy"] = offloaded.bytes
    offloaded.restore()

    engine = linear_engine(stage, trained=False)
    expected = engine(torch.ones(1, 512))
    offloaded = Offloaded(engine)
    bytes_of["without an optimizer"] = offloaded.bytes
    offloaded.restore()
    assert torch.equal(engine(torch.ones(1, 512)), expected)
    return bytes_of


@pytest.mark.parametrize("stage", [0, 3])
def test_gradients_and_other_tensors_leave_and_what_numpy_shares_stays(ranks, stage):
    (bytes_of,) = ranks(1).run(count_special, stage)
    matrix = 4 * 512 * 512
    assert bytes_of["with another tensor and its view"] == matrix + 8000
    assert bytes_of["with a gradient"] == 2 * matrix
    assert bytes_of["shared with numpy"] == 0
    assert bytes_of["without an optimizer"] >= matrix
