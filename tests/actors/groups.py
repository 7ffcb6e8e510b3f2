"""Helpers for tests of actors: rollouts, processes of a group, what a group must leave behind, a remote file system."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.fs as pafs
import ray
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray
from ray.util.placement_group import placement_group_table

from actors.runtime.rank_group import RankGroup
from tests.helpers import wait_until

CPUS = 0.5  # CPUs of a rank; several groups fit on the machine
GONE_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Rollouts:
    """Rollouts with two numbers for every response token."""

    sequences: list[list[int]]
    prompt_lengths: list[int]
    returns: list[NDArray[np.float32]]
    old_values: list[NDArray[np.float32]]

    def changed(self, rollout: int, **of_actions: NDArray[np.float32]) -> Rollouts:
        """Returns a copy with other numbers for one rollout."""
        return replace(
            self,
            **{
                name: [numbers if row == rollout else old for row, old in enumerate(getattr(self, name))]
                for name, numbers in of_actions.items()
            },
        )

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Arguments of `actors.ppo.critic_group.CriticGroup.update`."""
        return self.sequences, self.prompt_lengths, self.returns, self.old_values


def make_rollouts(prompts: int, per_prompt: int = 3, seed: int = 0, longest: int = 24) -> Rollouts:
    """Makes rollouts of very different lengths; several share a prompt, and some responses are empty."""
    rng = random.Random(seed)
    sequences, prompt_lengths = [], []
    for _ in range(prompts):
        prompt = [rng.randrange(3, 300) for _ in range(rng.randint(1, longest))]
        for sample in range(per_prompt):
            shortest = 0 if sample == 1 else 1
            sequences.append(prompt + [rng.randrange(3, 300) for _ in range(rng.randint(shortest, longest))])
            prompt_lengths.append(len(prompt))
    numbers = np.random.default_rng(seed)
    counts = [len(ids) - length for ids, length in zip(sequences, prompt_lengths, strict=True)]
    returns, old_values = ([numbers.normal(size=count).astype(np.float32) for count in counts] for _ in range(2))
    return Rollouts(sequences, prompt_lengths, returns, old_values)


def remote_file_system(directory: Path) -> pafs.FileSystem:
    """Returns a file system kept in a directory, which pyarrow and Ray take for a remote one."""
    return pafs.PyFileSystem(pafs.FSSpecHandler(DirFileSystem(str(directory), LocalFileSystem())))


def processes(group: RankGroup) -> list[psutil.Process]:
    """Returns the processes of a group's ranks."""
    return [
        psutil.Process(pid)
        for pid in ray.get([rank.__ray_call__.remote(lambda _: os.getpid()) for rank in group._ranks])
    ]


def require_gone(ranks: list[psutil.Process]) -> None:
    """Waits until the processes have ended."""
    wait_until(
        lambda: not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks),
        f"the end of the processes {[rank.pid for rank in ranks]}",
        GONE_TIMEOUT_S,
    )


@contextmanager
def leaves_nothing() -> Iterator[None]:
    """Waits after the block until all its placement groups and actors are gone."""
    groups, working = _placement_groups(), set(_worker_titles())
    yield
    _wait_for_none(lambda: _placement_groups() - groups, "placement groups")
    _wait_for_none(lambda: _actor_processes(but=working), "actors")


def _wait_for_none(left: Callable[[], set[Any]], what: str) -> None:
    try:
        wait_until(lambda: not left(), f"{what} to be removed", GONE_TIMEOUT_S)
    except AssertionError as error:
        raise AssertionError(f"{error}; left: {left()}") from None


def _placement_groups() -> set[str]:
    return {name for name, entry in placement_group_table().items() if entry["state"] != "REMOVED"}


def _actor_processes(but: set[int]) -> set[tuple[int, str]]:
    """Returns this session's actors by pid and class, without the processes that worked before.

    Those are recognised by pid only, because a title that is read while its process changes it is not a name.
    """
    return {(pid, title) for pid, title in _worker_titles().items() if pid not in but and title.startswith("ray::")}


def _worker_titles() -> dict[int, str]:
    """Returns titles of this session's processes by pid, without idle workers, any of which may become an actor."""
    titles = {}
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            title = " ".join(process.cmdline()).partition(".")[0]
            # Ray's own agents get such titles too, once they have started.
            if not title.startswith("ray::IDLE") and not title.endswith("Agent") and _is_ours(process):
                titles[process.pid] = title
    return titles


def _is_ours(process: psutil.Process) -> bool:
    """Returns whether this process started it, through the raylet."""
    return os.getpid() in [parent.pid for parent in process.parents()]
