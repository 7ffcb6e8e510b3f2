"""A run's history is a local directory to those who write it, wherever the run is stored."""

from pathlib import Path

import pyarrow.fs as pafs
import pytest
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem

from actors.run_directory import HistoryDirectory, absolute_storage_path, run_exists
from rlhf_critic.metrics import MetricsLog


@pytest.fixture
def object_store(tmp_path, monkeypatch) -> Path:
    """A file system that is not local as far as anyone can tell, kept in a folder."""
    root = tmp_path / "store"
    root.mkdir()
    remote = pafs.PyFileSystem(pafs.FSSpecHandler(DirFileSystem(str(root), LocalFileSystem())))
    monkeypatch.setattr(pafs.FileSystem, "from_uri", lambda uri: (remote, uri.removeprefix("s3://")))
    return root


def test_local_history_is_written_in_place(tmp_path):
    history = HistoryDirectory(str(tmp_path), "run")
    assert history.local == tmp_path / "run" / "history"
    MetricsLog(history.local, 0).write("train", 1, {"loss": 0.5})
    history.close()
    assert (tmp_path / "run" / "history" / "metrics.jsonl").read_text() == '{"kind": "train", "step": 1, "loss": 0.5}\n'


def test_remote_history_is_copied_up_and_continued(object_store):
    assert not run_exists("s3://bucket", "run")
    for step in (1, 2):
        history = HistoryDirectory("s3://bucket", "run")
        spool = history.local
        log = MetricsLog(spool, step - 1)
        log.write("train", step, {"loss": 0.5})
        log.close()
        history.close()
        assert not spool.exists()
    stored = object_store / "bucket" / "run" / "history" / "metrics.jsonl"
    assert len(stored.read_text().splitlines()) == 2
    assert run_exists("s3://bucket", "run")


def test_paths_become_absolute_and_uris_stay():
    assert absolute_storage_path("runs") == str(Path.cwd() / "runs")
    assert absolute_storage_path("s3://bucket/runs") == "s3://bucket/runs"
