"""Ranks join a process group without compiling anything."""

from pathlib import Path

import psutil
import pytest
from torch.distributed import TCPStore

from rlhf_critic.training.process_group import LOOPBACK, open_store
from tests.helpers import run_command

JOIN = """
import torch.distributed as dist
from rlhf_critic.training.process_group import init_distributed

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
init_distributed("gloo")
print("joined")
"""


def test_joining_compiles_nothing_and_waits_for_no_compiler(tmp_path):
    """The lock that a killed build leaves behind must not block later runs."""
    finished = run_command(["-c", JOIN], cwd=Path(), env={"TORCH_EXTENSIONS_DIR": str(tmp_path)}, timeout=100)
    assert "joined" in finished.stdout, finished.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("on_one_node", "expected"), [(True, LOOPBACK), (False, "127.0.0.2")])
def test_a_store_listens_where_the_other_ranks_are_and_nowhere_else(on_one_node, expected):
    store, address = open_store("127.0.0.2", on_one_node)
    assert address == expected
    here = [at.laddr for at in psutil.Process().net_connections("tcp") if at.status == psutil.CONN_LISTEN]
    assert {at.ip for at in here if at.port == store.port} == {expected}
    store.set("said", "by the first")
    assert TCPStore(address, store.port).get("said") == b"by the first"
