"""Fixtures that tests share: a small tokenizer, tiny models, one Ray for a session, and groups of ranks on it.

Processes of pytest-xdist share the files (``-n 3 --dist loadfile``). Fixtures decide which files stay together: those
of scorers, those of each folder that need Ray, and each file of pure tests.
"""

from __future__ import annotations

import os

os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    RAY_USAGE_STATS_ENABLED="0",
    DS_ACCELERATOR="cpu",
    RAY_TRAIN_ENABLE_PRINT_PATCH="0",
    RAY_TRAIN_ENABLE_PREEMPTION_WATCHER="0",  # a process for each run, which no test needs
    RAY_raylet_start_wait_time_s="120",  # on a busy machine Ray takes longer than it expects
    REPORTER_UPDATE_INTERVAL_MS="60000",  # by default Ray measures every process every 5 s
    RAY_SERVE_CONTROL_LOOP_INTERVAL_S="0.25",  # by default 0.1
    RAY_worker_niceness="0",  # by default 15: tests that wait for Ray would get what the other processes leave
    TOKENIZERS_PARALLELISM="false",
    # Threads that spin while they wait for each other waste what other processes could use.
    **({"OMP_NUM_THREADS": "1"} if "PYTEST_XDIST_WORKER" in os.environ else {}),
)

import re
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray import serve

from actors.serving import control
from jobs.serve import run_pool
from rlhf_critic.config.serve import ServeJobConfig
from tests import durations
from tests.actors.scorers import save_tiny_critic
from tests.helpers import RankGroup, save_tiny_model, save_tiny_tokenizer, write_preferences

SCORERS = "scorers"  # the name of the one pool
IN_PARALLEL = "PYTEST_XDIST_WORKER" in os.environ
torch.set_num_threads(1 if IN_PARALLEL else 2)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the option that writes the duration of every test to a file."""
    durations.add_option(parser)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Writes the durations where the option names a file."""
    durations.write(terminalreporter, config)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Gives each process of pytest-xdist whole groups of test files: see `group_of`."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFixture(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(config.rootpath, nodeid.partition("::")[0])

    return ByFixture(config, log)


@cache
def group_of(root: Path, file: str) -> str:
    """Returns the name of the group of files that run in one process, one after another, with this one."""
    signatures = " ".join(re.findall(r"def \w+\(([^)]*)\)", (root / file).read_text(encoding="utf-8")))
    fixtures = set(re.findall(r"\w+", signatures))
    if fixtures & {"serving", "serve_port"}:
        return "scorers"
    return "/".join(Path(file).parts[:2]) if fixtures & {"ranks", "ray_address"} else file


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Puts the groups that need Ray first, because they take longest; files of pure tests fill the gaps."""

    def is_pure(item: pytest.Item) -> bool:
        file = item.nodeid.partition("::")[0]
        return group_of(config.rootpath, file) == file

    items.sort(key=is_pure)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random Llama with untied embeddings, no pad token, and a vocabulary that is not a multiple of 8."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "untied", tie_word_embeddings=False)


@pytest.fixture(scope="session")
def tied_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random Llama with tied embeddings, and a tokenizer whose pad token is its EOS token."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tied", tie_word_embeddings=True, pad_is_eos=True)


@pytest.fixture
def tokenizer_dir(tmp_path: Path) -> Callable[..., str]:
    """Makes tokenizer directories with given properties."""
    return lambda **peculiarities: save_tiny_tokenizer(tmp_path / "tokenizer", **peculiarities)


@pytest.fixture(scope="session")
def preference_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Ninety preferences of very different lengths in which politeness wins."""
    return write_preferences(tmp_path_factory.mktemp("data") / "train.jsonl", 90)


@pytest.fixture(scope="session")
def ray_address() -> Iterator[str]:
    """One Ray for the whole session, with the Jobs API; it offers more CPUs than there are, so that all fit."""
    folder = tempfile.mkdtemp(prefix="ray-")  # not pytest's, whose path is too long for Ray's sockets
    with pytest.MonkeyPatch.context() as patch:
        # The agent behind the Jobs API takes any free port. By default it has a fixed one, which another Ray may hold.
        any_port = partial(ray._private.parameter.RayParams, dashboard_agent_listen_port=0)
        patch.setattr(ray._private.parameter, "RayParams", any_port)
        context = ray.init(
            "local", num_cpus=6, include_dashboard=True, logging_level="ERROR", log_to_driver=False, _temp_dir=folder
        )
    address = context.address_info["gcs_address"]
    # A submitted job joins the Ray that this file names, or else any Ray of the machine, such as that of another test.
    ray._private.utils.write_ray_address(address, folder)
    yield address
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def ranks(ray_address: str) -> Iterator[Callable[[int], RankGroup]]:
    """Groups of Ray actors, each the ranks of one process group; made once for each world size."""
    groups: dict[int, RankGroup] = {}

    def group(world_size: int) -> RankGroup:
        if world_size not in groups:
            groups[world_size] = RankGroup(world_size)
        return groups[world_size]

    yield group
    for made in groups.values():
        made.shutdown()


@pytest.fixture(scope="session")
def critics(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two critics with different rewards."""
    directory = tmp_path_factory.mktemp("critics")
    return {
        "first": save_tiny_critic(tiny_model, directory / "first", seed=1, version="tiny@1"),
        "second": save_tiny_critic(tiny_model, directory / "second", seed=2, version="tiny@2"),
    }


@pytest.fixture(scope="session")
def serve_port(ray_address: str) -> Iterator[int]:
    """The port on which Ray Serve listens once a pool was started."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    yield port
    serve.shutdown()


@pytest.fixture(scope="session")
def serving(serve_port: int) -> Callable[..., str]:
    """Runs the pool with some options, or changes the one that runs; returns its URL.

    The pool stays for the whole session, so each test that uses it asks for the options that it needs.
    """

    def run(checkpoint: str, **options: Any) -> str:
        # A fraction of a CPU, so that the pool leaves room for the actors of other tests.
        options = {"cpus_per_shard": 0.3, "start_timeout_s": 200, **options}
        url, _, _ = run_pool(ServeJobConfig(checkpoint=checkpoint, port=serve_port, **options), lambda _: None)
        return url

    return run


@pytest.fixture
def no_pool(serve_port: int) -> None:
    """Ends the pool that earlier tests left, so that the next one begins with counters at zero."""
    if control.is_running(SCORERS):
        control.stop(SCORERS)
