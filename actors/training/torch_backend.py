"""Process group of Ray Train's workers: set up as Ray Train does, but listening only where the workers are.

Ray Train's own set-up opens torch's store at every address of the machine. Knows nothing about what workers compute.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ray
from ray.train.torch import TorchConfig

from actors.runtime.rank_group import join_ranks, open_store_of_ranks
from actors.runtime.ray_internals import TorchBackend, set_torch_distributed_env_vars


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
        store = worker_group.execute_single(0, open_store_of_ranks)
        arguments = (join_ranks, *store, backend_config.backend, backend_config.timeout_s)
        ray.get([worker_group.execute_single_async(rank, *arguments) for rank in range(len(worker_group))])
