"""A run's history is a local directory to those who write it, wherever the run is stored."""

from pathlib import Path

import pyarrow.fs as pafs
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem

from actors.run_directory import HistoryDirectory, absolute_storage_path, resolve_run, run_exists
from rlhf_critic.metrics import MetricsLog


def test_local_history_is_written_in_place(tmp_path):
    for storage_path in (str(tmp_path), f"file://{tmp_path}"):
        history = HistoryDirectory(*resolve_run(storage_path, "run"))
        assert history.local == tmp_path / "run" / "history"
    MetricsLog(history.local, 0).write("train", 1, {"loss": 0.5})
    history.close()
    assert (tmp_path / "run" / "history" / "metrics.jsonl").read_text() == '{"kind": "train", "step": 1, "loss": 0.5}\n'


def test_remote_history_is_copied_up_and_continued(tmp_path):
    # A file system that is not local as far as anyone can tell, kept in a folder.
    remote = pafs.PyFileSystem(pafs.FSSpecHandler(DirFileSystem(str(tmp_path), LocalFileSystem())))
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
    assert run_exists(remote, "bucket/run")


def test_paths_become_absolute_and_uris_stay():
    assert absolute_storage_path("runs") == str(Path.cwd() / "runs")
    assert absolute_storage_path("s3://bucket/runs") == "s3://bucket/runs"
