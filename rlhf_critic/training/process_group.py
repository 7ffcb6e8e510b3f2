"""Process group of the ranks: rendezvous store, torch's process group, DeepSpeed's communication, joint failure.

Rank-to-rank traffic is unauthenticated. So the store and Gloo bind to loopback if all ranks are on one node and to the
node address otherwise, never to 0.0.0.0. Knows nothing about critics or who starts the processes.
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

from rlhf_critic.config.deepspeed import Hardware
from rlhf_critic.errors import CriticError

LOOPBACK = "127.0.0.1"
PATIENCE = timedelta(days=365)
T = TypeVar("T")


def open_store(node_address: str, on_one_node: bool) -> tuple[TCPStore, str]:
    """Opens the rendezvous store of the ranks, on a port that the system chooses.

    A store that torch opens itself listens at every address of the machine.

    Args:
        node_address: Address at which other nodes reach this one.
        on_one_node: Whether all ranks are on this node. If so, the store is on loopback.

    Returns:
        The store, which lives as long as it is referenced, and its address.
    """
    address = LOOPBACK if on_one_node else node_address
    listener = socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET)
    port = listener.getsockname()[1]
    store = TCPStore(address, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    return store, address


def init_process_group(
    backend: str, store: TCPStore, rank: int, world_size: int, timeout: timedelta, on_one_node: bool
) -> None:
    """Joins the process group of the ranks that share a store.

    Args:
        backend: ``gloo`` or ``nccl``.
        store: The store; see `open_store`.
        rank: Rank of this process.
        world_size: Number of ranks.
        timeout: Maximum wait for the other ranks, now and in every collective.
        on_one_node: Whether all ranks are on this node. If so, they communicate over loopback, unless the environment
            names another interface.
    """
    if on_one_node:
        loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(variable, loopback)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def init_distributed(backend: str) -> None:
    """Initialises DeepSpeed's communication, and ``torch.distributed`` unless the caller has.

    The backend is ``gloo`` or ``nccl``; rank and world size come from the environment. Nothing is compiled: DeepSpeed
    would build its shared-memory all-reduce for CPUs on first use, which only its inference engine calls. A process
    that is killed during that build leaves a lock behind, on which every later process of the user waits forever.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, timeout=default_pg_timeout)


def hardware_of_ranks() -> Hardware:
    """Returns the devices of all ranks."""
    from deepspeed.accelerator import get_accelerator

    return Hardware(on_gpu=get_accelerator().device_name() == "cuda", ranks=dist.get_world_size())


def patient_group() -> dist.ProcessGroup:
    """Creates a group of all ranks that wait for each other as long as it takes, on CPUs. Collective.

    The default group ends the ranks when a collective takes longer than half an hour. A rank that is lost still ends
    the wait of the others, because it closes its connections.
    """
    return cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=PATIENCE))


def raise_on_all_ranks(action: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Runs an action on this rank and raises on all ranks if it failed on any, so that no rank waits for a failed one.

    Args:
        action: The action of this rank.
        group: The group in which ranks wait for each other; None for the default one. See `patient_group`.

    Raises:
        CriticError: The error of the lowest rank on which ``action`` raised a `CriticError`.
    """
    result, error = None, None
    try:
        result = action()
    except CriticError as raised:
        error = raised
    errors: list[CriticError | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error, group=group)
    for first in errors:
        if first is not None:
            raise first
    return cast(T, result)
