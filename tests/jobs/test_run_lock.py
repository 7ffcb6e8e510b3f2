"""Two jobs do not work on one run."""

import signal
import subprocess
import sys

import pytest

from jobs.run_lock import lock_run, prepare_run
from rlhf_critic.errors import ConfigError

HOLD = """
import sys, time
from jobs.run_lock import lock_run, prepare_run
with lock_run(sys.argv[1], "mine"):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_run_is_held_by_one_job_until_it_ends_however_it_ends(tmp_path):
    storage = tmp_path / "runs"
    with subprocess.Popen([sys.executable, "-c", HOLD, f"file://{storage}"], stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout.readline() == "held\n"
        with (
            pytest.raises(ConfigError, match="another job is at work on the run 'mine'"),
            lock_run(str(storage), "mine"),
        ):
            pass
        with lock_run(str(storage), "another"):
            pass
        job.send_signal(signal.SIGKILL)
        job.wait(30)
        for _ in range(2):
            with lock_run(str(storage), "mine"):
                pass


def test_a_place_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("not a directory")
    with (
        pytest.raises(ConfigError, match=r"run\.storage_path .*file: cannot be written"),
        lock_run(str(tmp_path / "file"), "mine"),
    ):
        pass


def test_a_failed_start_leaves_a_name_free_and_a_history_or_checkpoint_stays(tmp_path):
    run = tmp_path / "mine"
    for made, stays in ((".validate_storage_marker", False), ("history", True), ("step-000001", True)):
        with pytest.raises(ZeroDivisionError), lock_run(str(tmp_path), "mine"):
            prepare_run(str(tmp_path), "mine", resume=False)
            (run / made).mkdir(parents=True)
            raise ZeroDivisionError
        assert run.exists() == stays
    with lock_run(str(tmp_path), "mine"):
        with pytest.raises(ConfigError, match=r"there is a run named 'mine'.*--resume, or choose another --run\.name"):
            prepare_run(str(tmp_path), "mine", resume=False)
        prepare_run(str(tmp_path), "mine", resume=True)
    assert {path.name for path in run.iterdir()} == {"step-000001"}, "the history was of an attempt that saved nothing"


def test_a_directory_of_something_else_is_not_taken_for_a_leftover(tmp_path):
    (tmp_path / "mine" / "thesis").mkdir(parents=True)
    with pytest.raises(ConfigError, match="there is a run named"), lock_run(str(tmp_path), "mine"):
        prepare_run(str(tmp_path), "mine", resume=False)
    assert (tmp_path / "mine" / "thesis").exists()
