"""The script for GPU machines runs on a CPU with tiny models, so that it works where there is a GPU."""

import subprocess
import sys

import pytest

from benchmarks.gpu import main as script
from benchmarks.gpu.profile_step import busy


@pytest.mark.parametrize("part", ["parity", "profile_step"])
def test_a_part_measures_and_is_within_its_tolerance(tmp_path, part):
    command = [sys.executable, "-m", "benchmarks.gpu.main", "--device", "cpu", "--tiny", "--out", str(tmp_path)]
    done = subprocess.run([*command, "--part", part], capture_output=True, text=True, timeout=280, check=False)
    rows = script.read_rows(tmp_path)
    assert not [row for row in rows if row.get("ok") is False]
    assert done.returncode == 0, done.stderr[-2000:]
    assert {row["part"] for row in rows} == {part}
    assert not [row for row in rows if "skipped" in row]
    assert all(row["case"] in done.stdout for row in rows)


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
