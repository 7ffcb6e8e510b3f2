"""Ranks of one process group in Ray actors, and one sequencer that calls them all.

A sharded model computes in collectives, so all ranks must make the same calls in the same order. `RankGroup` is the
only caller of its actors and makes one call at a time. When a rank is lost, the others would wait for it forever. So
the group ends all ranks and raises `RankLost`, and its owner starts another group. Knows nothing about what ranks
compute.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import ray
import torch
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from safetensors import SafetensorError
from torch.distributed import TCPStore

from actors.runtime.environment import compute_environment
from actors.runtime.failures import is_loss
from rlhf_critic.errors import (
    CriticError,
    NonFiniteLossError,
    PlacementError,
    RankFailed,
    RankLost,
    describe_error,
)
from rlhf_critic.logs import configure_logging
from rlhf_critic.training.process_group import init_distributed, init_process_group, open_store

START_TIMEOUT_S = 600.0
# All ranks reject a bad call at once. A rank that has not answered after this time made other calls than the rest.
AGREEMENT_TIMEOUT_S = 20.0
_stores: list[TCPStore] = []  # in the first rank's process, which must hold the store for as long as there are ranks


class Rank:
    """One rank, in an actor. Subclasses add methods.

    A collective that a peer does not join fails after ``collective_timeout_s`` seconds.
    """

    def __init__(
        self, rank: int, world_size: int, local_world_size: int, use_gpu: bool, collective_timeout_s: float
    ) -> None:
        configure_logging()
        self.rank = rank
        self._use_gpu = use_gpu
        self._collective_timeout_s = collective_timeout_s
        # Ray shows an actor its own devices only, so the local device is always the first.
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK="0")
        os.environ["LOCAL_WORLD_SIZE"] = str(local_world_size)
        if use_gpu:
            torch.cuda.set_device(0)

    def open_store(self) -> tuple[str, int]:
        """Opens the store in which ranks find each other; see `open_store_of_ranks`."""
        return open_store_of_ranks()

    def join(self, address: str, port: int) -> None:
        """Joins the process group of all ranks."""
        backend = "nccl" if self._use_gpu else "gloo"
        join_ranks(address, port, backend, max(1.0, self._collective_timeout_s))
        init_distributed(backend)


class RankGroup:
    """Handle of all ranks. It stays in the process that made it, because two handles could interleave collectives.

    Args:
        what: Name of the ranks in messages, such as ``critic``.
        actor_class: Class of the ranks, a subclass of `Rank`.
        ranks: Number of ranks.
        cpus_per_rank: CPUs that Ray reserves for each rank.
        use_gpu: Whether each rank has a GPU and ranks use NCCL.
        start_timeout_s: Seconds to wait for room, for the ranks to start and for them to join.
        call_timeout_s: Maximum seconds of a call, unless the call has its own.
        in_own_bundles: Whether the placement group of the calling actor has bundles for the ranks after its own bundle.
            Each has room for a rank of this group and one of its successor.

    Raises:
        PlacementError: The cluster had no room for the ranks in time.
        RankLost: A rank did not start.
    """

    def __init__(
        self,
        what: str,
        actor_class: type[Rank],
        ranks: int,
        *,
        cpus_per_rank: float = 1.0,
        use_gpu: bool = False,
        start_timeout_s: float = START_TIMEOUT_S,
        call_timeout_s: float = START_TIMEOUT_S,
        in_own_bundles: bool = False,
    ) -> None:
        self.what = what
        self.call_timeout_s = call_timeout_s
        self._sequencer = threading.Lock()
        self._ended = ""
        self._ranks: list[Any] = []
        self._own_group: PlacementGroup | None = None
        resources = {"CPU": cpus_per_rank, **({"GPU": 1.0} if use_gpu else {})}
        deadline = time.monotonic() + start_timeout_s
        try:
            group, bundles = self._place(ranks, resources, start_timeout_s, in_own_bundles)
            nodes = placement_group_table(group)["bundles_to_node_id"]
            bundles = sorted(bundles, key=lambda bundle: (nodes[bundle], bundle))
            neighbours = [nodes[bundle] for bundle in bundles]
            # Half of a bundle that is not the group's own, because its successor starts beside it on the same device.
            share = 1.0 if group is self._own_group else 0.5
            # Without OMP_NUM_THREADS, Ray derives the number of threads from the reserved CPUs.
            variables = {"OMP_NUM_THREADS": str(max(1, int(cpus_per_rank)))}
            variables |= compute_environment(use_gpu)
            reserved = {"num_cpus": share * cpus_per_rank, "num_gpus": share if use_gpu else 0}
            remote_class = ray.remote(**reserved, max_restarts=0, runtime_env={"env_vars": variables})(actor_class)
            self._ranks = [
                remote_class.options(scheduling_strategy=PlacementGroupSchedulingStrategy(group, bundle)).remote(
                    rank, ranks, neighbours.count(nodes[bundle]), use_gpu, call_timeout_s
                )
                for rank, bundle in enumerate(bundles)
            ]
            # At a port that the first rank holds, because a free port may be taken meanwhile.
            address, port = self._answers("start", [self._ranks[0].open_store.remote()], _seconds_to(deadline))[0]
            self._answers("join", [rank.join.remote(address, port) for rank in self._ranks], _seconds_to(deadline))
        except BaseException:
            self.close()
            raise

    def __reduce__(self) -> Any:
        raise TypeError(
            f"the handle of a {self.what} group stays in its process, where it puts calls in one order; to share it, "
            "hold it in an actor of your own"
        )

    def __len__(self) -> int:
        return len(self._ranks)

    def call_all(self, doing: str, method: str, *arguments: Any, timeout_s: float | None = None) -> list[Any]:
        """Calls a method on all ranks and returns their answers. A lock makes concurrent callers wait.

        Args:
            doing: Purpose of the call in messages, such as ``compute values``.
            method: Name of the method.
            *arguments: Arguments, the same for all ranks.
            timeout_s: Maximum seconds of this call. Default: the group's.

        Returns:
            The answers of the ranks, in their order.

        Raises:
            RankLost: A rank was lost, or did not answer in time; the group has ended.
            RankFailed: A rank failed with an error that another group would meet too; the group has ended.
            CriticError: All ranks rejected the call; the group is still usable, unless its loss was not finite.
            ValueError: All ranks rejected the call; the group is still usable.
        """
        with self._sequencer:
            if self._ended:
                raise RankLost(f"the {self.what} group has ended ({self._ended}): start or restore another")
            calls = [getattr(rank, method).remote(*arguments) for rank in self._ranks]
            try:
                return self._answers(doing, calls, self.call_timeout_s if timeout_s is None else timeout_s)
            except (RankLost, NonFiniteLossError) as error:
                # Ranks may be at different calls, or hold half of a step's gradient.
                self.close(str(error))
                raise

    def close(self, why: str = "it was shut down") -> None:
        """Ends the ranks and frees what they had reserved; may be called again."""
        self._ended = self._ended or why
        for rank in self._ranks:
            ray.kill(rank)
        # Cleared first, because two threads may close at once: the one that noticed a loss, and the owner's.
        own_group, self._own_group = self._own_group, None
        if own_group is not None:
            ray.util.remove_placement_group(own_group)

    def _answers(self, doing: str, calls: list[Any], timeout_s: float) -> list[Any]:
        """Collects answers as they come, so that a loss is noticed while other ranks still wait for the lost one."""
        answers: dict[Any, Any] = {}
        rejections: dict[Any, Exception] = {}
        deadline = time.monotonic() + timeout_s
        while len(answers) + len(rejections) < len(calls):
            pending = [call for call in calls if call not in answers and call not in rejections]
            ready, _ = ray.wait(pending, num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                if rejections:
                    break
                raise RankLost(f"waited {timeout_s:g} s for {len(calls)} {self.what} ranks to {doing}")
            try:
                answers[ready[0]] = ray.get(ready[0])
            except RayTaskError as error:
                if not isinstance(error.cause, CriticError | ValueError):
                    raise self._failure(calls.index(ready[0]), doing, error) from error
                rejections[ready[0]] = error.cause
                deadline = min(deadline, time.monotonic() + AGREEMENT_TIMEOUT_S)
            except RayError as error:
                lost = RankLost if is_loss(error) else RankFailed  # not lost: its constructor failed
                raise lost(
                    f"{self.what} rank {calls.index(ready[0])} was lost during a call to {doing}: {error}"
                ) from error
        if not rejections:
            return [answers[call] for call in calls]
        first = next(iter(rejections.values()))
        if len(rejections) < len(calls):
            raise RankFailed(f"some {self.what} ranks rejected a call to {doing}, others did not: {first}") from first
        raise first

    def _failure(self, rank: int, doing: str, error: RayTaskError) -> RankLost:
        """Returns the error of a rank that failed: `RankFailed`, unless it failed because it lost another rank."""
        cause: Any = error.cause
        if is_loss(cause):
            return RankLost(f"{self.what} rank {rank} failed to {doing}: {type(cause).__name__}: {cause}")
        described = describe_error(error)
        failed = RankFailed(f"{self.what} rank {rank} failed to {doing}: {described}")
        failed.exit_code, failed.trace = described.exit_code, described.trace
        return failed

    def _place(
        self, ranks: int, resources: dict[str, float], timeout_s: float, in_own_bundles: bool
    ) -> tuple[PlacementGroup, list[int]]:
        """Reserves room for the ranks; returns the placement group and the numbers of their bundles in it."""
        current = ray.util.get_current_placement_group()
        if in_own_bundles and current is not None:
            return current, list(range(1, ranks + 1))
        # Created before any check of free resources, because a pending group makes an autoscaler add nodes.
        self._own_group = ray.util.placement_group([resources] * ranks, strategy="PACK")
        if not self._own_group.wait(timeout_s):
            raise PlacementError(
                f"{ranks} {self.what} ranks with {resources} each could not be placed within {timeout_s:g} s: ask for "
                "fewer, or let the autoscaler add nodes"
            )
        return self._own_group, list(range(ranks))


def _seconds_to(deadline: float) -> float:
    return max(1.0, deadline - time.monotonic())


def _on_one_node() -> bool:
    return os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]


def open_store_of_ranks() -> tuple[str, int]:
    """Opens the store in which the ranks find each other, in the first one's process; returns its address and port."""
    store, address = open_store(ray.util.get_node_ip_address(), _on_one_node())
    _stores[:] = [store]
    return address, store.port


def join_ranks(address: str, port: int, backend: str, timeout_s: float) -> None:
    """Joins this process, whose rank is in the environment, to the process group of the ranks that share a store."""
    rank, world_size, timeout = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), timedelta(seconds=timeout_s)
    store = _stores[0] if rank == 0 else TCPStore(address, port, timeout=timeout)
    init_process_group(backend, store, rank, world_size, timeout, _on_one_node())


@contextmanager
def raise_write_errors() -> Iterator[None]:
    """Raises the write error of a rank instead of `RankLost`, because another group would meet a full disk too.

    Raises:
        OSError: A rank could not write. The group has ended, because the other ranks wait for it.
    """
    try:
        yield
    except RankLost as error:
        cause = getattr(error.__cause__, "cause", None)
        # The errors of Python, safetensors and torch; torch's has no class of its own.
        is_of_disk = isinstance(cause, OSError | SafetensorError) or "PytorchStreamWriter" in str(cause)
        if is_of_disk and not isinstance(cause, ConnectionError):
            raise OSError(str(cause)) from error
        raise
