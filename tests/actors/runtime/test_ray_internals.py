"""The Ray that is installed has every private name that this project uses, and nothing else uses such names."""

import re
import subprocess
from pathlib import Path

import pytest

from actors.runtime import ray_internals

ROOT = Path(ray_internals.__file__).parents[2]
PRIVATE = re.compile(r"\bray\.(?:\w+\.)*(?:_\w+|v2\b)|\bray\.\S* import .*\b_\w+")


@pytest.mark.parametrize("name", ray_internals.LOCATIONS)
def test_every_name_is_there(name):
    assert getattr(ray_internals, name) is not None


def test_no_other_file_uses_private_names():
    files = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    found = [
        f"{file}:{number}: {line.strip()}"
        for file in files.split()
        if file.startswith(("actors/", "jobs/", "rlhf_critic/")) and file != "actors/runtime/ray_internals.py"
        for number, line in enumerate((ROOT / file).read_text(encoding="utf-8").splitlines(), 1)
        if PRIVATE.search(line)
    ]
    assert not found


def test_an_unknown_name_is_no_attribute():
    assert not hasattr(ray_internals, "no_such_name")
