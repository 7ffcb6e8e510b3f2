"""Files and directories appear complete or not at all, and importing the module that writes them is cheap."""

import json
import os
import subprocess
import sys
import zlib

import pytest

from rlhf_critic.errors import CheckpointError
from rlhf_critic.files import atomic_directory, atomic_file, verify_manifest, write_manifest


def test_importing_the_module_loads_no_torch():
    code = "import rlhf_critic.files, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_file_is_replaced_when_its_block_ends_and_kept_when_it_fails(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    with atomic_file(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    """Writers on two nodes may have the same process id."""
    path = tmp_path / "file.txt"
    with atomic_file(path) as one, atomic_file(path) as other:
        one.write_text("one")
        other.write_text("other")
        assert one != other
    assert path.read_text() == "one"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o755), (0o077, 0o700), (0o007, 0o770)])
def test_a_directory_has_the_permissions_that_the_user_wants(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        with atomic_directory(tmp_path / "critic") as building:
            (building / "file").touch()
    finally:
        os.umask(before)
    assert (tmp_path / "critic").stat().st_mode & 0o777 == mode
    assert [path.name for path in tmp_path.rglob("*")] == ["critic", "file"]


def test_of_two_processes_that_build_one_directory_the_second_keeps_that_of_the_first(tmp_path):
    path = tmp_path / "entry"
    with atomic_directory(path, keep_existing=True) as second:
        with atomic_directory(path, keep_existing=True) as first:
            (first / "file").write_text("first")
        (second / "file").write_text("second")
    assert (path / "file").read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(CheckpointError, match="exists already"), atomic_directory(path):
        pass


@pytest.mark.parametrize("checksum", ["sha256", "crc32"])
def test_manifests_of_this_version_and_of_the_first_are_verified(tmp_path, checksum):
    (tmp_path / "state").write_bytes(b"intact")
    if checksum == "sha256":
        write_manifest(tmp_path, 0, 1)
        assert list(json.loads((tmp_path / "manifest-0-of-1.json").read_text())["state"]) == ["bytes", "sha256"]
    else:
        manifest = {"state": {"bytes": 6, "crc32": zlib.crc32(b"intact")}}
        (tmp_path / "manifest-0-of-1.json").write_text(json.dumps(manifest))
    verify_manifest(tmp_path)
    (tmp_path / "state").write_bytes(b"in tct")
    with pytest.raises(CheckpointError, match="state: damaged"):
        verify_manifest(tmp_path)


def test_manifests_that_disagree_about_a_file_are_damaged(tmp_path):
    (tmp_path / "state").write_text("one")
    write_manifest(tmp_path, 0, 2, "state")
    (tmp_path / "state").write_text("two")
    write_manifest(tmp_path, 1, 2, "state")
    with pytest.raises(CheckpointError, match=r"manifest-1-of-2\.json: damaged .*records state differently"):
        verify_manifest(tmp_path)
