"""A state resumes exactly on any number of ranks, and a failed conversion raises an error.

The functions below are sent to real ranks (Ray actors) and run there.
"""

import os
import tempfile
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf_critic.checkpoint.critic_directory import RESUME_FOLDER
from rlhf_critic.config.model import ModelConfig
from rlhf_critic.data.encoding import Encoder, load_tokenizer
from rlhf_critic.data.preferences import load_preferences
from rlhf_critic.errors import CheckpointError
from rlhf_critic.training.critic_engine import CriticEngine
from rlhf_critic.training.engine import STATE_TAG
from rlhf_critic.training.reshard import convert
from tests.helpers import slow_except, wait_until
from tests.rlhf_critic.training.critic_runs import FEW, OPTIONS, STEPS, card_of, train, whole_weights

HALF = FEW // 2
# A large decay, so that a group with the decay of another one is detected.
CHANGES = {"weight_decay": 0.3}


def make(source: str, data: str, cache: str, model: dict[str, Any], changes: dict[str, Any]) -> Any:
    encoder = Encoder(load_tokenizer(source), max_length=64)
    options = OPTIONS.model_copy(update={**CHANGES, **changes})
    engine = CriticEngine.from_pretrained(encoder, ModelConfig(path=source, **model), options, STEPS)
    return engine, load_preferences(data, encoder, cache), encoder


def straight(until: int, directory: str, *run: Any) -> tuple[list[dict], dict]:
    """Trains to the end, and saves on the way if a directory is given."""
    engine, preferences, encoder = make(*run)
    metrics = train(engine, preferences, until)
    if directory:
        engine.save(directory, encoder, card_of(encoder))
        metrics += train(engine, preferences, FEW)
    return metrics, whole_weights(engine)


def resume(directory: str, *run: Any) -> tuple[list[dict], dict, int]:
    engine, preferences, _ = make(*run)
    engine.load(directory)
    assert engine.step == HALF
    metrics = train(engine, preferences, FEW)
    return metrics, whole_weights(engine), engine.training.token_budget


def left_behind() -> set[str]:
    return {name for name in os.listdir(tempfile.gettempdir()) if name.startswith("rlhf-critic-resize-")}


def tree(directory: Path) -> list[tuple[Path, int]]:
    return sorted((path, path.stat().st_mtime_ns) for path in directory.rglob("*"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


def assert_goes_on(ranks, saved: Path, before: int, after: int, run: tuple, tolerance: float) -> None:
    """Trains on some ranks, resumes half-way on others, and compares with an uninterrupted run."""
    expected_metrics, expected_weights = ranks(before).run(straight, HALF, str(saved), *run)[0]
    stored, temporary = tree(saved), left_behind()
    of_ranks = ranks(after).run(resume, str(saved), *run)
    assert tree(saved) == stored, "a stored checkpoint stays as it is"
    wait_until(lambda: left_behind() <= temporary, "temporary directories to be removed")
    for metrics, weights, budget in of_ranks:
        for step, expected in zip(metrics, expected_metrics[HALF:], strict=True):
            assert step["step"] == expected["step"]
            assert step["learning_rate"] == expected["learning_rate"]
            assert step["loss"] == pytest.approx(expected["loss"], rel=tolerance)
            assert step["grad_norm"] == pytest.approx(expected["grad_norm"], rel=10 * tolerance)
        for name, expected in expected_weights.items():
            torch.testing.assert_close(weights[name], expected, rtol=0, atol=tolerance, msg=name)
        assert budget == OPTIONS.token_budget


@pytest.mark.parametrize(
    ("stage", "before", "after"),
    slow_except([(2, 2, 1)], [(0, 2, 1), *((stage, 2, after) for stage in (1, 2, 3) for after in (1, 4))]),
)
def test_another_number_of_ranks_changes_nothing(
    ranks, tiny_model, preference_file, cache, tmp_path, stage, before, after
):
    run = (tiny_model, preference_file, cache, {}, {"zero_stage": stage})
    assert_goes_on(ranks, tmp_path / "saved [3]", before, after, run, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "model", "changes"),
    [
        (2, {"freeze_layers": 1}, {}),
        (3, {"lora_rank": 3, "freeze_layers": 1}, {}),
        (1, {}, {"offload_optimizer": True}),
        (3, {}, {"offload_optimizer": True, "offload_parameters": True}),
    ],
    ids=str,
)
def test_so_it_does_with_frozen_layers_adapters_and_offloading(
    ranks, tiny_model, preference_file, cache, tmp_path, stage, model, changes
):
    run = (tiny_model, preference_file, cache, model, {"zero_stage": stage, **changes})
    assert_goes_on(ranks, tmp_path / "saved [3]", 2, 4, run, 1e-5)


def save_midway(directory: str, until: int, *run: Any) -> dict:
    engine, preferences, encoder = make(*run)
    train(engine, preferences, until)
    engine.save(directory, encoder, card_of(encoder))
    return whole_weights(engine)


def load_and_save(directory: str, again: str, *run: Any) -> tuple[dict, list[torch.Tensor], list[float]]:
    """Returns gathered weights, this rank's step counts, and the decay of each group."""
    engine, _, encoder = make(*run)
    engine.load(directory)
    optimizer = engine._engine.optimizer
    steps = [moments["step"] for moments in optimizer.state.values()]
    own = [step.data_ptr() for step in steps]
    engine.save(again, encoder, card_of(encoder))
    assert len(set(own)) == len(own), "each is counted up by itself"
    return whole_weights(engine), steps, [group["weight_decay"] for group in optimizer.param_groups]


def merged(saved: str, directory: Path, stage: int) -> dict[str, torch.Tensor]:
    """Returns every parameter in fp32 and its moments, as a critic directory holds them."""
    directory.mkdir()
    convert(Path(saved) / RESUME_FOLDER / STATE_TAG, directory / "universal", stage)
    files = {str(path.relative_to(directory)): path for path in directory.glob("universal/zero/*/*.pt")}
    contents = {name: torch.load(path, weights_only=False) for name, path in files.items()}
    return {name: content["param"] if isinstance(content, dict) else content for name, content in contents.items()}


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_all_that_was_saved_comes_back_bit_for_bit_whatever_base_model_the_engine_was_built_from(
    ranks, tiny_model, preference_file, cache, tmp_path, stage
):
    """Resharding restores bf16 parameters with their fp32 copies, and frozen layers, which no optimizer has."""
    model, saved = AutoModelForCausalLM.from_pretrained(tiny_model), str(tmp_path / "saved")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    model.save_pretrained(tmp_path / "other")
    load_tokenizer(tiny_model).save_pretrained(tmp_path / "other")
    options = (preference_file, cache, {"freeze_layers": 1, "dtype": "bfloat16"}, {"zero_stage": stage})
    expected = ranks(2).run(save_midway, saved, HALF, tiny_model, *options)[0]
    again = str(tmp_path / "again")
    for weights, steps, decays in ranks(4).run(load_and_save, saved, again, str(tmp_path / "other"), *options):
        for name, tensor in expected.items():
            torch.testing.assert_close(weights[name], tensor, rtol=0, atol=0, msg=name)
        assert [float(step) for step in steps] == [HALF, HALF]
        assert decays == [0.3, 0.0]
    before, after = (merged(place, tmp_path / f"merged-{Path(place).name}", stage) for place in (saved, again))
    assert before.keys() == after.keys()
    assert len([name for name in before if "exp_avg_sq" in name]) > 10
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=0, msg=name)


def refusal(directory: str, *run: Any) -> str:
    engine, *_ = make(*run)
    with pytest.raises(CheckpointError) as refused:
        engine.load(directory)
    return str(refused.value)


@pytest.mark.slow
def test_what_cannot_be_converted_is_refused_on_all_ranks_and_leaves_nothing(
    ranks, tiny_model, preference_file, cache, tmp_path
):
    def run(stage: int) -> tuple:
        return (tiny_model, preference_file, cache, {}, {"zero_stage": stage})

    saved, new = tmp_path / "saved", tmp_path / "new"
    ranks(2).run(save_midway, str(saved), 1, *run(2))
    ranks(2).run(save_midway, str(new), 0, *run(2))
    before = left_behind()
    assert "saved with zero_stage=2, now 3" in ranks(1).run(refusal, str(saved), *run(3))[0]
    assert "before the first step" in ranks(1).run(refusal, str(new), *run(2))[0]
    shard = next((saved / RESUME_FOLDER / STATE_TAG).glob("*pp_rank_1*optim_states.pt"))
    os.truncate(shard, shard.stat().st_size // 2)
    for message in ranks(4).run(refusal, str(saved), *run(2)):
        assert "needs DeepSpeed's conversion" in message
        assert "ended with exit code 1" in message
        assert "zip archive" in message, "the end of the conversion's output"
    wait_until(lambda: left_behind() <= before, "temporary directories to be removed")


def test_a_conversion_that_takes_too_long_is_ended_with_its_processes(tmp_path):
    with pytest.raises(CheckpointError, match=r"which did not end within 0\.2 s"):
        convert(tmp_path, tmp_path / "universal", 2, timeout_s=0.2)
    running = [child for child in psutil.Process().children(recursive=True) if "ds_to_universal" in child.cmdline()]
    assert not running
