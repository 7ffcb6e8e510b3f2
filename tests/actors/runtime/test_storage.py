"""The directory of a run: its history is a local directory to its writers, wherever the run is stored."""

import pytest

from actors.runtime.storage import (
    HistoryDirectory,
    check_free_space,
    checkpoint_name,
    checkpoint_names,
    remove_broken_list,
    remove_leftover,
    resolve_run,
    run_exists,
    size_of,
)
from rlhf_critic.errors import CheckpointError
from rlhf_critic.training.metrics_log import MetricsLog
from tests.actors.groups import remote_file_system


def test_local_history_is_written_in_place(tmp_path):
    for storage_path in (str(tmp_path), f"file://{tmp_path}"):
        history = HistoryDirectory(*resolve_run(storage_path, "run"))
        assert history.local == tmp_path / "run" / "history"
    MetricsLog(history.local, 0).write("train", 1, {"loss": 0.5})
    history.close()
    assert (tmp_path / "run" / "history" / "metrics.jsonl").read_text() == '{"kind": "train", "step": 1, "loss": 0.5}\n'


def test_remote_history_is_copied_up_and_continued(tmp_path):
    remote = remote_file_system(tmp_path)
    assert not run_exists(remote, "bucket/run")
    for step in (1, 2):
        history = HistoryDirectory(remote, "bucket/run")
        log = MetricsLog(history.local, step - 1)
        log.write("train", step, {"loss": 0.5})
        log.close()
        history.close()
        assert not history.local.exists()
    stored = tmp_path / "bucket" / "run" / "history" / "metrics.jsonl"
    assert len(stored.read_text().splitlines()) == 2
    assert not run_exists(remote, "bucket/run"), "a history alone cannot be resumed"
    (tmp_path / "bucket" / "run" / "step-000002").mkdir()
    assert run_exists(remote, "bucket/run")


def test_a_local_history_is_kept_and_copied(tmp_path):
    local = tmp_path / "local"
    history = HistoryDirectory(remote_file_system(tmp_path), "bucket/run", local)
    log = MetricsLog(history.local, 0)
    log.write("train", 1, {"loss": 0.5})
    log.close()
    history.close()
    assert (local / "metrics.jsonl").read_text() == (tmp_path / "bucket/run/history/metrics.jsonl").read_text()


def test_a_leftover_goes_and_its_neighbours_stay(tmp_path):
    for checkpoint in ("step-1", "step-2"):
        (tmp_path / "run" / checkpoint / "resume").mkdir(parents=True)
    run = resolve_run(str(tmp_path), "run")
    for _ in range(2):
        remove_leftover(*run, "step-2")
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["step-1"]


def test_checkpoints_are_listed_from_the_newest_on_and_one_made_again_comes_before_the_one_that_was_damaged(tmp_path):
    run = resolve_run(str(tmp_path), "run")
    assert checkpoint_names(*run) == []
    for name in ("step-000009", "step-000030", "step-000030-again", "step-1000000", "history", "step-x", "old-step-1"):
        (tmp_path / "run" / name).mkdir(parents=True)
    assert checkpoint_names(*run) == ["step-1000000", "step-000030-again", "step-000030", "step-000009"]
    assert checkpoint_name(30) == "step-000030"


def test_a_list_that_cannot_be_read_is_removed_and_another_stays(tmp_path, caplog):
    run, path = resolve_run(str(tmp_path), "run"), tmp_path / "run" / "checkpoint_manager_snapshot.json"
    remove_broken_list(*run)
    path.parent.mkdir()
    path.write_text("{}")
    remove_broken_list(*run)
    assert path.exists()
    assert not caplog.text
    path.write_text("")
    remove_broken_list(*run)
    assert not path.exists()
    assert f"removed unreadable Ray Train snapshot {path}" in caplog.text


def test_a_checkpoint_for_which_there_is_no_room_is_not_begun(tmp_path):
    (tmp_path / "run" / "deep").mkdir(parents=True)
    for path in (tmp_path / "run" / "one", tmp_path / "run" / "deep" / "other"):
        path.write_bytes(bytes(700))
    assert size_of(tmp_path / "run") == 1400
    run = resolve_run(str(tmp_path), "run")
    check_free_space(*run, 1400)
    with pytest.raises(CheckpointError, match="takes up to 1e\\+12 MB"):
        check_free_space(*run, 10**18)
