"""The wheel holds every module and every data file, and its metadata names the command."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import rlhf_critic

pytest.importorskip("setuptools", minversion="77")

TOP = Path(__file__).parents[1]
PACKAGES = ("rlhf_critic", "actors", "jobs")


def test_the_wheel_holds_all_modules_and_data_files(tmp_path):
    source = tmp_path / "source"
    for package in PACKAGES:
        shutil.copytree(TOP / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(TOP / name, source)
    wanted = {path.relative_to(source).as_posix() for package in PACKAGES for path in (source / package).rglob("*.*")}
    assert {"rlhf_critic/py.typed", "jobs/quickstart.yaml", "jobs/examples/verl_reward.sh"} < wanted
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, source]
    built = subprocess.run(build, capture_output=True, text=True, check=False, timeout=240)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        about = f"rlhf_critic-{rlhf_critic.__version__}.dist-info"
        assert "rlhf-critic = jobs.main:main" in archive.read(f"{about}/entry_points.txt").decode()
    assert held == wanted
