"""Ranks of one process group in Ray actors, and one sequencer that calls them all.

What is sharded over ranks computes in collectives: all ranks must make the same calls in the same order. `RankGroup` is
the only caller its actors have, and it lets one call in at a time. When a rank is lost the others would wait for it
without end; then the group ends itself, says so, and whoever holds it starts another. Knows nothing of what ranks do.
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

from rlhf_critic.errors import CriticError, NonFiniteLossError, PlacementError, RankLost

START_TIMEOUT_S = 600.0
# Ranks that refuse a call all do so at once; one that does not answer within this has gone another way.
AGREEMENT_TIMEOUT_S = 20.0


class Rank:
    """One rank, in an actor; what a group does is in subclasses.

    Args:
        rank: Its number.
        world_size: Number of ranks.
        local_world_size: Ranks on its node.
        use_gpu: Whether it has a GPU.
        collective_timeout_s: After which a collective that a peer does not join fails.
    """

    def __init__(
        self, rank: int, world_size: int, local_world_size: int, use_gpu: bool, collective_timeout_s: float
    ) -> None:
        self.rank = rank
        self._use_gpu = use_gpu
        self._collective_timeout_s = collective_timeout_s
        # Ray shows an actor its own devices only, so that the local one is always the first.
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK="0")
        os.environ["LOCAL_WORLD_SIZE"] = str(local_world_size)
        self._on_one_node = local_world_size == world_size
        if use_gpu:
            torch.cuda.set_device(0)  # not yet run on a GPU

    def open_store(self) -> tuple[str, int]:
        """Opens the store in which ranks find each other; returns where it is."""
        from rlhf_critic.training.process_group import open_store

        self._store, address = open_store(ray.util.get_node_ip_address(), self._on_one_node)
        return address, self._store.port

    def join(self, address: str, port: int) -> None:
        """Meets the other ranks."""
        from rlhf_critic.training.process_group import init_distributed, init_process_group

        timeout = timedelta(seconds=max(1.0, self._collective_timeout_s))
        store = self._store if self.rank == 0 else TCPStore(address, port, timeout=timeout)
        backend = "nccl" if self._use_gpu else "gloo"
        init_process_group(backend, store, self.rank, int(os.environ["WORLD_SIZE"]), timeout, self._on_one_node)
        init_distributed(backend)


class RankGroup:
    """The handle of all ranks. It stays in the process that made it: two of them could interleave collectives.

    Args:
        what: What the ranks are, for messages: ``critic``.
        actor_class: A subclass of `Rank`.
        ranks: How many.
        cpus_per_rank: CPUs that Ray reserves for each.
        use_gpu: One GPU for each, and NCCL (not yet run on a GPU).
        start_timeout_s: How long to wait for room, for the ranks to start and for them to meet.
        call_timeout_s: How long a call may take, unless it says otherwise.
        environment: Environment variables of the ranks.
        in_own_bundles: Whether the placement group of the calling actor has bundles for the ranks, behind its own, each
            with room for a rank of this group and one of its successor.

    Raises:
        PlacementError: The cluster has no room for the ranks, and got none in time.
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
        environment: dict[str, str] | None = None,
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
            # Half of a bundle that is not the group's own: its successor starts beside it, on the same device.
            share = 1.0 if group is self._own_group else 0.5
            remote_class = ray.remote(num_cpus=share * cpus_per_rank, num_gpus=share if use_gpu else 0, max_restarts=0)(
                actor_class
            )
            # Ray would take the CPUs that are reserved for the threads that there may be.
            variables = {"OMP_NUM_THREADS": str(max(1, int(cpus_per_rank))), **(environment or {})}
            self._ranks = [
                remote_class.options(
                    scheduling_strategy=PlacementGroupSchedulingStrategy(group, bundle),
                    runtime_env={"env_vars": {**({} if use_gpu else {"DS_ACCELERATOR": "cpu"}), **variables}},
                ).remote(rank, ranks, neighbours.count(nodes[bundle]), use_gpu, call_timeout_s)
                for rank, bundle in enumerate(bundles)
            ]
            self._join(deadline)
        except BaseException:
            self.close()
            raise

    def __reduce__(self) -> Any:
        raise TypeError(
            f"the handle of a {self.what} group stays in its process, where it puts calls in one order; hold it in an "
            "actor of your own to share it"
        )

    def __len__(self) -> int:
        return len(self._ranks)

    def call_all(self, doing: str, method: str, *arguments: Any, timeout_s: float | None = None) -> list[Any]:
        """Calls a method on all ranks and waits for all answers; one caller at a time.

        Args:
            doing: What for, for messages: ``compute values``.
            method: Its name.
            *arguments: The same for all ranks.
            timeout_s: Instead of the group's.

        Returns:
            What each rank returned.

        Raises:
            RankLost: A rank was lost, failed, or did not answer in time; the group has ended.
            CriticError: All ranks refused the call; the group goes on, unless its loss was not finite.
            ValueError: Likewise.
        """
        with self._sequencer:
            if self._ended:
                raise RankLost(f"the {self.what} group has ended ({self._ended}): start or restore another")
            calls = [getattr(rank, method).remote(*arguments) for rank in self._ranks]
            try:
                return self._answers(doing, calls, self.call_timeout_s if timeout_s is None else timeout_s)
            except (RankLost, NonFiniteLossError) as error:
                # Ranks may no longer agree on what comes next, or hold half of a step's gradient.
                self.close(str(error))
                raise

    def close(self, why: str = "it was shut down") -> None:
        """Ends the ranks and gives back what they had reserved; may be called again."""
        self._ended = self._ended or why
        for rank in self._ranks:
            ray.kill(rank)
        # Taken first: two threads may close at once, the one that noticed a loss and the one that gives up.
        own_group, self._own_group = self._own_group, None
        if own_group is not None:
            ray.util.remove_placement_group(own_group)

    def _answers(self, doing: str, calls: list[Any], timeout_s: float) -> list[Any]:
        """The answers as they come, so that a loss is noticed while the others still wait for the lost."""
        answers: dict[Any, Any] = {}
        refusals: dict[Any, Exception] = {}
        deadline = time.monotonic() + timeout_s
        while len(answers) + len(refusals) < len(calls):
            pending = [call for call in calls if call not in answers and call not in refusals]
            ready, _ = ray.wait(pending, num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                if refusals:
                    break
                raise RankLost(f"waited {timeout_s:g} s for {len(calls)} {self.what} ranks to {doing}")
            try:
                answers[ready[0]] = ray.get(ready[0])
            except RayTaskError as error:
                if not isinstance(error.cause, CriticError | ValueError):
                    raise RankLost(
                        f"{self.what} rank {calls.index(ready[0])} failed to {doing}: "
                        f"{type(error.cause).__name__}: {error.cause}"
                    ) from error
                refusals[ready[0]] = error.cause
                deadline = min(deadline, time.monotonic() + AGREEMENT_TIMEOUT_S)
            except RayError as error:
                raise RankLost(
                    f"{self.what} rank {calls.index(ready[0])} was lost while it was to {doing}: {error}"
                ) from error
        if not refusals:
            return [answers[call] for call in calls]
        first = next(iter(refusals.values()))
        if len(refusals) < len(calls):
            raise RankLost(f"some {self.what} ranks refused to {doing}, others did not: {first}") from first
        raise first

    def _place(
        self, ranks: int, resources: dict[str, float], timeout_s: float, in_own_bundles: bool
    ) -> tuple[PlacementGroup, list[int]]:
        """Where the ranks go: the placement group and the numbers of their bundles in it."""
        current = ray.util.get_current_placement_group()
        if in_own_bundles and current is not None:
            return current, list(range(1, ranks + 1))
        # Asked for first, looked at later: a group that waits is what makes an autoscaler add nodes.
        self._own_group = ray.util.placement_group([resources] * ranks, strategy="PACK")
        if not self._own_group.wait(timeout_s):
            raise PlacementError(
                f"{ranks} {self.what} ranks with {resources} each could not be placed within {timeout_s:g} s: ask for "
                "fewer, or let the autoscaler add nodes"
            )
        return self._own_group, list(range(ranks))

    def _join(self, deadline: float) -> None:
        """Lets the ranks meet, at a port that the first holds: one that was merely free could be taken meanwhile."""
        address, port = self._answers("start", [self._ranks[0].open_store.remote()], _seconds_to(deadline))[0]
        self._answers("meet", [rank.join.remote(address, port) for rank in self._ranks], _seconds_to(deadline))


def _seconds_to(deadline: float) -> float:
    return max(1.0, deadline - time.monotonic())


@contextmanager
def write_failures_told() -> Iterator[None]:
    """Around a call by which ranks write: a disk that is full is no lost rank, and another group would meet it too.

    Raises:
        OSError: A rank could not write; the group has ended, because the others wait for it.
    """
    try:
        yield
    except RankLost as error:
        cause = getattr(error.__cause__, "cause", None)
        # What Python, safetensors and torch raise, of which the last has no class of its own.
        is_of_disk = isinstance(cause, OSError | SafetensorError) or "PytorchStreamWriter" in str(cause)
        if is_of_disk and not isinstance(cause, ConnectionError):
            raise OSError(str(cause)) from error
        raise
