"""Process group of Ray Train's workers: set up as Ray Train does, but listening only where the workers are.

Ray Train's own set-up opens torch's store at every address of the machine. Knows nothing about what workers compute.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ray
from ray.train.torch import TorchConfig
from torch.distributed import TCPStore

from actors.runtime.ray_internals import TorchBackend, set_torch_distributed_env_vars

# In the first rank's process, which must hold the store for as long as there are ranks.
_stores: list[TCPStore] = []


@dataclass
class PrivateTorchConfig(TorchConfig):
    """A ``TorchConfig`` whose workers connect over loopback if they are on one node."""

    @property
    def backend_cls(self) -> type:
        """The class that starts and ends the process group."""
        return _PrivateTorchBackend


class _PrivateTorchBackend(TorchBackend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(set_torch_distributed_env_vars)
        address, port = worker_group.execute_single(0, _open_store)
        ray.get(
            [
                worker_group.execute_single_async(
                    rank, _join, address, port, backend_config.backend, backend_config.timeout_s
                )
                for rank in range(len(worker_group))
            ]
        )


def _on_one_node() -> bool:
    return os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]


def _open_store() -> tuple[str, int]:
    from rlhf_critic.training.process_group import open_store

    store, address = open_store(ray.util.get_node_ip_address(), _on_one_node())
    _stores[:] = [store]
    return address, store.port


def _join(address: str, port: int, backend: str, timeout_s: int) -> None:
    from rlhf_critic.training.process_group import init_process_group

    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    timeout = timedelta(seconds=timeout_s)
    store = _stores[0] if rank == 0 else TCPStore(address, port, timeout=timeout)
    init_process_group(backend, store, rank, world_size, timeout, _on_one_node())
