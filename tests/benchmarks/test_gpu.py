"""The script for GPU machines runs on a CPU with tiny models, so that it works where there is a GPU."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from benchmarks.gpu import main as script
from benchmarks.gpu.profile_step import LARGEST, busy

TOP = Path(__file__).parents[2]


def run_script(out: Path, *options: str) -> list[dict]:
    """Runs the script with tiny models on a CPU, without wheels; returns its rows."""
    command = ["bash", "benchmarks/gpu/run.sh", "--device", "cpu", "--tiny", "--out", str(out), *options]
    environment = {**os.environ, "PYTHON": sys.executable, "WHEELS": str(out / "none"), "PACKAGES": str(out / "none")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, cwd=TOP, env=environment)
    rows = script.read_rows(out)
    assert not [row for row in rows if row.get("ok") is False or "skipped" in row]
    assert done.returncode == 0, done.stderr[-2000:]
    assert all(row["case"] in done.stdout for row in rows)
    return rows


def test_a_part_alone_measures(tmp_path):
    (row,) = run_script(tmp_path, "--part", "profile_step")
    assert len(row["largest"]) == LARGEST


@pytest.mark.slow
def test_all_parts_are_within_their_tolerances_and_written_to_one_file(tmp_path):
    rows = run_script(tmp_path)
    assert [part.module for part in script.PARTS] == list(dict.fromkeys(row["part"] for row in rows))
    results = json.loads((tmp_path / script.results_name("cpu")).read_text(encoding="utf-8"))
    assert results["rows"] == rows
    assert results["card"] is None
    assert results["versions"]["torch"] == version("torch")


def test_a_case_that_fails_is_a_row_and_the_rest_goes_on(tmp_path, monkeypatch):
    def fail(*_: object) -> dict:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr("benchmarks.gpu.parity.compare", fail)
    monkeypatch.setattr("benchmarks.gpu.parity.compare_long", lambda *_: {"ok": True})
    code = script.main(["--device", "cpu", "--tiny", "--quick", "--out", str(tmp_path)])
    rows = script.read_rows(tmp_path)
    assert code == 1
    assert {row.get("error") for row in rows[:-1]} == {"RuntimeError: no such kernel"}
    assert "FAILED" in script.table_of(rows)


def test_without_a_gpu_the_message_says_what_to_do(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        script.main(["--out", str(tmp_path)])
    assert "--device cpu --tiny" in capsys.readouterr().err


def test_the_busy_time_counts_overlaps_once():
    assert busy([(0.0, 2.0), (1.0, 3.0), (5.0, 6.0)]) == 4.0
