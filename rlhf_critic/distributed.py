"""How a process joins its ranks: torch's process group and DeepSpeed's communication on top of it.

Knows nothing of critics, and nothing of who starts the processes.
"""

from __future__ import annotations

from datetime import timedelta

import deepspeed
from torch.distributed.constants import default_pg_timeout


def init_distributed(backend: str, timeout: timedelta = default_pg_timeout) -> None:
    """Initialises ``torch.distributed``, unless the caller has, and DeepSpeed's communication.

    Without a compiler: DeepSpeed would build its shared-memory all-reduce for CPUs on first use, which only its
    inference engine calls. A process that is killed during that build leaves a lock behind, for which every later
    process of the user waits without end.

    Args:
        backend: ``gloo`` or ``nccl``; rank and world size come from the environment.
        timeout: How long to wait for the other ranks, now and in every collective.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, timeout=timeout)
