"""A PPO run resumes from its newest complete checkpoint, also one that an earlier version wrote."""

import shutil
from pathlib import Path

import pytest

from actors.ppo.checkpoint import (
    PPO_STATE_NAME,
    checkpoints,
    free_options,
    latest_checkpoint,
    quarantine_damaged_checkpoints,
    remove_unfinished_checkpoints,
)
from rlhf_critic.config.base import changed_options
from rlhf_critic.config.ppo import PPOJobConfig
from rlhf_critic.errors import CheckpointError
from rlhf_critic.files import write_manifest


@pytest.fixture
def run(tmp_path) -> Path:
    for iteration in (3, 6, 9):
        checkpoint = tmp_path / f"iteration-{iteration:06d}"
        for part in ("policy", "critic"):
            (checkpoint / part).mkdir(parents=True)
            (checkpoint / part / "model.safetensors").write_text(f"{part} after {iteration}")
            write_manifest(checkpoint / part, 0, 1)
        (checkpoint / PPO_STATE_NAME).write_text("{}")
        write_manifest(checkpoint, 0, 1, PPO_STATE_NAME)
    return tmp_path


def names(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir())


def test_what_is_whole_keeps_its_name(run, tmp_path):
    before = names(run)
    quarantine_damaged_checkpoints(run)
    assert names(run) == before
    quarantine_damaged_checkpoints(tmp_path / "not begun")


@pytest.mark.parametrize("damaged", ["policy/model.safetensors", "critic/model.safetensors", PPO_STATE_NAME])
def test_what_is_damaged_is_kept_under_another_name(run, damaged, caplog):
    newest, before = latest_checkpoint(run), checkpoints(run)[1]
    (newest / damaged).write_text("broken")
    quarantine_damaged_checkpoints(run)
    assert latest_checkpoint(run) == before
    assert (run / f"damaged-{newest.name}" / damaged).read_text() == "broken"
    assert f"{damaged}: damaged" in caplog.text
    assert f"resuming_from={before.name}" in caplog.text


def test_a_checkpoint_that_is_damaged_again_after_it_was_made_again_is_kept_too(run):
    newest = latest_checkpoint(run)
    whole = shutil.copytree(newest, run / "whole")
    for content in ("broken", "broken again"):
        (newest / PPO_STATE_NAME).write_text(content)
        quarantine_damaged_checkpoints(run)
        shutil.copytree(whole, newest)
    kept = [run / f"damaged-{newest.name}{again}" / PPO_STATE_NAME for again in ("", "-again")]
    assert [path.read_text() for path in kept] == ["broken", "broken again"]


def test_a_run_without_a_whole_checkpoint_is_not_begun_again(run):
    for checkpoint in checkpoints(run):
        (checkpoint / "critic" / "model.safetensors").unlink()
    before = names(run)
    with pytest.raises(CheckpointError, match=r"iteration-000009.*missing"):
        quarantine_damaged_checkpoints(run)
    assert names(run) == before


def test_what_a_killed_save_left_is_removed(run):
    before = names(run)
    (run / ".iteration-000012-84c2dhn_" / "policy").mkdir(parents=True)
    (run / ".iteration-000012-84c2dhn_" / "policy" / "model.safetensors").write_text("half")
    (run / "history").mkdir()
    remove_unfinished_checkpoints(run)
    assert names(run) == sorted([*before, "history"])
    remove_unfinished_checkpoints(run / "not begun")


def test_options_of_an_earlier_version_are_compared_by_their_new_names_and_new_options_by_their_defaults():
    saved = PPOJobConfig.model_validate({"ppo": {"gae_lambda": 0.9}}).model_dump(mode="json")
    saved["ppo"]["lam"] = saved["ppo"].pop("gae_lambda")
    del saved["run"]["wandb_project"], saved["ppo"]["clip"]
    before = PPOJobConfig.model_validate(saved)
    for options, expected in (
        ({"gae_lambda": 0.9}, []),
        ({"gae_lambda": 0.9, "clip": 0.3}, ["ppo.clip: 0.2 -> 0.3"]),
        ({"gae_lambda": 0.95}, ["ppo.gae_lambda: 0.9 -> 0.95"]),
    ):
        after = PPOJobConfig.model_validate({"ppo": options})
        assert changed_options(before, after, free_options(before, after)) == expected
