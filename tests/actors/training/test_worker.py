"""The options that a resumed run may change, and the downloads of a remote checkpoint."""

import os
import tempfile
import time
from pathlib import Path

import pytest

from actors.training.worker import FREE_OPTIONS, prefix_of_saves, remove_unfinished_saves, stored_checkpoints
from rlhf_critic.config.base import changed_options
from rlhf_critic.config.train import TrainJobConfig
from tests.actors.groups import remote_file_system

OPTIONS = {"model": {"path": "m"}, "data": {"train": "d"}, "train": {"learning_rate": 1e-3}}


def changed(**sections: dict) -> list[str]:
    now = {name: {**OPTIONS.get(name, {}), **sections.get(name, {})} for name in {*OPTIONS, *sections}}
    before, after = (TrainJobConfig.model_validate(options) for options in (OPTIONS, now))
    return changed_options(before, after, FREE_OPTIONS)


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


def test_what_killed_workers_left_is_removed_for_this_run_only(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left, of_another, other = (
        tmp_path / f"{prefix_of_saves('/runs', name)}0f-0" for name in ("mine", "mine-2", "another")
    )
    for directory in (left, of_another, other):
        (directory / "resume").mkdir(parents=True)
        (directory / "resume" / "half").write_text("of a checkpoint")
    remove_unfinished_saves("/runs", "mine")
    assert sorted(tmp_path.iterdir()) == sorted([of_another, other])


def open_newest(storage: str) -> tuple[str, str, str]:
    """Opens a run's newest checkpoint on a rank, and returns its name, the directory and the content of its file."""
    name, checkpoint = stored_checkpoints(remote_file_system(Path(storage)), "run")[0]
    with checkpoint.as_directory() as directory:
        content = (Path(directory) / "model.safetensors").read_text()
        time.sleep(2)  # the ranks hold it at the same time, as ranks that load do
        return name, directory, content


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2])
def test_ranks_of_a_node_share_one_download_of_a_remote_checkpoint(ranks, tmp_path, world_size):
    for step in (3, 6):
        checkpoint = tmp_path / "run" / f"step-00000{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "model.safetensors").write_text(f"weights after {step}")
    opened = ranks(world_size).run(open_newest, str(tmp_path))
    assert len(set(opened)) == 1, "each rank has a copy of its own"
    name, directory, content = opened[0]
    assert (name, content) == ("step-000006", "weights after 6")
    assert not directory.startswith(str(tmp_path))
    assert not os.path.exists(directory)
