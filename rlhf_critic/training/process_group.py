"""How a process joins its ranks, and fails with them.

A store to meet at, torch's process group and DeepSpeed's communication on top of it.

What ranks say to each other asks nobody for a token, so it listens where other ranks are and nowhere else. Knows
nothing of critics, and nothing of who starts the processes.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar, cast

import torch.distributed as dist
from torch.distributed import TCPStore
from torch.distributed.constants import default_pg_timeout

from rlhf_critic.errors import CriticError

LOOPBACK = "127.0.0.1"
T = TypeVar("T")


def open_store(node_address: str, on_one_node: bool) -> tuple[TCPStore, str]:
    """Opens the store in which ranks find each other, on a port that the system chooses.

    A store that torch opens by itself listens at every address of the machine.

    Args:
        node_address: Where other nodes reach this one.
        on_one_node: Whether all ranks are on this node; then the store is on loopback.

    Returns:
        The store, which lives as long as somebody holds it, and its address.
    """
    address = LOOPBACK if on_one_node else node_address
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.create_server((address, 0), family=family)
    port = listener.getsockname()[1]
    store = TCPStore(address, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    return store, address


def init_process_group(
    backend: str, store: TCPStore, rank: int, world_size: int, timeout: timedelta, on_one_node: bool
) -> None:
    """Joins the process group of the ranks that have this store.

    Args:
        backend: ``gloo`` or ``nccl``.
        store: See `open_store`.
        rank: Of this process.
        world_size: Number of ranks.
        timeout: How long to wait for the other ranks, now and in every collective.
        on_one_node: Whether all ranks are on this node; then they talk over loopback, unless the environment names
            another device.
    """
    if on_one_node:
        loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):  # the latter not yet run on a GPU
            os.environ.setdefault(variable, loopback)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def init_distributed(backend: str, timeout: timedelta = default_pg_timeout) -> None:
    """Initialises ``torch.distributed``, unless the caller has, and DeepSpeed's communication.

    Without a compiler: DeepSpeed would build its shared-memory all-reduce for CPUs on first use, which only its
    inference engine calls. A process that is killed during that build leaves a lock behind, for which every later
    process of the user waits without end.

    Args:
        backend: ``gloo`` or ``nccl``; rank and world size come from the environment.
        timeout: How long to wait for the other ranks, now and in every collective.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, timeout=timeout)


def raise_on_all_ranks(action: Callable[[], T]) -> T:
    """Does something on this rank, then fails on all ranks if it failed on any, so that none waits for the lost.

    Raises:
        CriticError: What ``action`` raised on the lowest rank where it raised a `CriticError`.
    """
    result, error = None, None
    try:
        result = action()
    except CriticError as raised:
        error = raised
    errors: list[CriticError | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    first = next((raised for raised in errors if raised is not None), None)
    if first is not None:
        raise first
    return cast(T, result)
