"""Starts, changes and stops a pool of scorers: writes Ray Serve's configuration and waits until replicas follow it.

A pool is deployed as a Serve config, like ``serve deploy``: a config that differs only in options or in the critic
reaches running replicas without restarting them, which Serve's Python API cannot do. The config is passed to Serve's
controller as ``serve run CONFIG`` does it. Knows nothing about command lines.
"""

from __future__ import annotations

import copy
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray import serve
from ray.exceptions import ActorAlreadyExistsError
from ray.serve.config import HTTPOptions
from ray.serve.schema import ApplicationStatus, ServeDeploySchema

from actors.runtime.environment import compute_environment
from actors.runtime.ray_internals import get_serve_client
from actors.runtime.storage import local_directory
from actors.serving.deployment import deployment_hash
from actors.serving.handle import DEFAULT_APP, SCORER_DEPLOYMENT
from actors.serving.http_api import is_loopback
from actors.serving.replica_status import NAMESPACE, ON_HEAD, read_status, status_of
from rlhf_critic.config.model import AssumedEncoding
from rlhf_critic.config.serve import ScorerConfig, ServeJobConfig
from rlhf_critic.errors import CheckpointError, ConfigError, PlacementError

IMPORT_PATH = "actors.serving.deployment:app"
POLL_S = 0.2
WATCH_EVERY_S = 0.5  # the controller, which answers, also scales and heals
WRITER_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 300.0
SEQUENCER_CPUS = 0.1
SCALING_OPTIONS = {"min_replicas", "max_replicas", "target_ongoing_requests", "upscale_delay_s", "downscale_delay_s"}
# Environment variables that replicas take over from the process that starts them.
PASSED_ON = ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "TOKENIZERS_PARALLELISM")

Progress = Callable[[str], None]


def route_of(app: str) -> str:
    """Returns the route of a pool's endpoints: the root for the default pool, its name for any other."""
    return "/" if app == DEFAULT_APP else f"/{app}"


def start_serve(config: ServeJobConfig, authenticated: bool) -> str:
    """Starts Serve if it is not running, and returns the URL of the pool.

    Raises:
        ConfigError: Serve is already reachable from other machines, and the pool requires no token.
    """
    serve.start(http_options=HTTPOptions(host=config.host, port=config.port))
    actual = _client().http_config  # the options of the process that started Serve first
    if not is_loopback(actual.host) and not authenticated and config.auth != "off":
        raise ConfigError(
            f"Ray Serve listens on {actual.host}, which other machines can reach: require a token with --auth on (or "
            "use --auth off if a proxy in front of it authenticates callers)"
        )
    return url_of(actual.host, actual.port, config.app)


def url_of(host: str, port: int, app: str) -> str:
    """Returns the URL of a pool. An IPv6 address stands in brackets."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}{route_of(app)}".rstrip("/")


def checked(config: ServeJobConfig, checkpoint: str) -> ScorerConfig:
    """Checks the critic and returns the configuration of a replica.

    Raises:
        CheckpointError: The critic is incomplete or damaged, or lacks what the options need.
        ConfigError: The components are not valid.
    """
    return _with_digest(config.scorer_config(checkpoint, ""))


def deploy(config: ServeJobConfig, scorer: ScorerConfig, token_sha256: str | None, progress: Progress) -> str:
    """Starts the pool or changes the running one, and returns the version that every replica serves.

    A running pool keeps its configuration if the change fails.

    Raises:
        CheckpointError: The critic cannot be served.
        PlacementError: Not every replica served it in time.
        ConfigError: Another process changed the pool meanwhile.
    """
    after = {**application(config, scorer, token_sha256), "runtime_env": _runtime_environment(config.use_gpu)}
    return _change(config.app, _deployed(config.app), after, config.start_timeout_s, progress)


def application(config: ServeJobConfig, scorer: ScorerConfig, token_sha256: str | None) -> dict[str, Any]:
    """Returns the pool's entry in Ray Serve's configuration, without the ``runtime_env`` of the process that starts it.

    See `actors.serving.http_api.HttpSettings` for ``token_sha256``.
    """
    hardware = config.model_dump(include={"shards", "cpus_per_shard", "use_gpu"})
    replicas: dict[str, Any] = {
        "name": SCORER_DEPLOYMENT,
        "autoscaling_config": {
            **config.model_dump(include=SCALING_OPTIONS),
            "initial_replicas": max(1, config.min_replicas),
            "metrics_interval_s": min(2.0, max(0.1, config.upscale_delay_s / 2)),
            "look_back_period_s": min(10.0, max(0.5, config.upscale_delay_s)),
        },
        "max_ongoing_requests": config.max_ongoing_requests,
        "max_queued_requests": config.max_queued_requests,
        "user_config": {"scorer": scorer.model_dump(mode="json"), **hardware},
    }
    devices = {"num_cpus": config.cpus_per_shard, "num_gpus": int(config.use_gpu)}
    if config.shards == 1:
        replicas["ray_actor_options"] = devices
    else:
        shard = {"CPU": config.cpus_per_shard, **({"GPU": 1} if config.use_gpu else {})}
        replicas["ray_actor_options"] = {"num_cpus": SEQUENCER_CPUS}
        replicas["placement_group_bundles"] = [{"CPU": SEQUENCER_CPUS}] + [shard] * config.shards
        replicas["placement_group_strategy"] = "PACK"
    http = {
        "token_sha256": token_sha256,
        **config.model_dump(include={"max_body_bytes", "deadline_s", "collect"}, exclude_none=True),
    }
    if config.auth == "off":
        http["auth"] = "off"
    gateway = {"name": "Gateway", "user_config": {"http": http, "max_items": config.max_items}}
    return {
        "name": config.app,
        "route_prefix": route_of(config.app),
        "import_path": IMPORT_PATH,
        "deployments": [replicas, gateway],
    }


def publish(
    app: str, checkpoint: str, timeout_s: float, progress: Progress, encoding: AssumedEncoding | None = None
) -> str:
    """Swaps the critic of a running pool, keeps its other options, and returns the version that every replica serves.

    ``encoding`` is for a reward model without ``critic.json``.

    Raises:
        ConfigError: There is no such pool, it runs another version of this package, or another process changed it
            meanwhile.
        CheckpointError: The critic cannot be served; the pool keeps the previous one.
        PlacementError: Not every replica served it in time; the pool returns to the previous one.
    """
    before = _deployed(app)
    if before is None:
        raise ConfigError(f"there is no pool {app!r} to publish to: start it with python -m jobs.serve {checkpoint}")
    if before["import_path"] != IMPORT_PATH:
        raise ConfigError(
            f"the pool {app!r} was started by another version of rlhf-critic: stop it (python -m jobs.serve --stop) "
            f"and start it again with python -m jobs.serve {checkpoint}"
        )
    after = copy.deepcopy(before)
    user_config = _replicas(after)["user_config"]
    of_checkpoint = {"checkpoint": checkpoint, **(encoding or AssumedEncoding()).model_dump()}
    scorer = ScorerConfig(**{**user_config["scorer"], **of_checkpoint})
    user_config["scorer"] = _with_digest(scorer).model_dump(mode="json")
    return _change(app, before, after, timeout_s, progress)


def wait_until_served(app: str, timeout_s: float, progress: Progress, wanted: str | None = None) -> str:
    """Waits until every replica of a pool serves the published configuration, and returns the version it has.

    A replica that is still starting at the time of publishing is not waited for. It starts with the previous
    configuration, names that version in its answers, and then swaps.

    Args:
        app: The pool's name.
        timeout_s: Maximum time to wait, in seconds.
        progress: Called with a line of text about the replicas that serve it so far.
        wanted: Hash of the published configuration; None takes the latest one.

    Raises:
        CheckpointError: A replica cannot serve it.
        PlacementError: Not every replica served it in time.
        ConfigError: Another process changed or stopped the pool meanwhile.
    """
    deadline = time.monotonic() + timeout_s
    wanted = wanted or _published(app)
    while True:
        if (published := _published(app)) != wanted:
            what = "stopped" if published is None else "changed"
            raise ConfigError(f"the pool {app!r} was {what} by another process meanwhile")
        status, message, running, target = _state(app)
        reports = [report for report in read_status(app) if report.replica in running and report.published == wanted]
        if error := next((report.error for report in reports if report.error), ""):
            raise CheckpointError(f"a replica cannot serve the published critic: {error}")
        current = [report for report in reports if report.is_current]
        progress(f"{len(current)} of {max(len(running), target)} replicas serve the critic ({status})")
        if status == "DEPLOY_FAILED":
            raise CheckpointError(f"the pool could not be started: {_last_line(message)}")
        if status == "RUNNING" and running and len(current) == len(running):
            return current[0].info.model_version
        if time.monotonic() > deadline:
            why = f"{status}: {_last_line(message)}" if message else status
            raise PlacementError(
                f"{len(current)} of {max(len(running), target)} replicas of {app!r} serve the published critic after "
                f"{timeout_s:g} s ({why}): add nodes, lower --min-replicas, or raise --start-timeout-s"
            )
        time.sleep(WATCH_EVERY_S)


def stop(app: str) -> None:
    """Stops a pool after its replicas have answered the calls they accepted.

    Raises:
        ConfigError: There is no such pool.
    """
    if not is_running(app):
        raise ConfigError(f"there is no pool {app!r} to stop")
    # First, so that an interrupted stop leaves a pool that can be stopped again, not a status actor alone.
    ray.kill(status_of(app))
    with only_writer():
        serve.delete(app, _blocking=False)
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while _client().get_serve_details()["applications"].get(app) is not None and not is_running(app):
        if time.monotonic() > deadline:
            raise PlacementError(f"the pool {app!r} did not end within {STOP_TIMEOUT_S:g} s: see `serve status`")
        time.sleep(POLL_S)


def is_running(app: str) -> bool:
    """Returns whether there is such a pool."""
    return _deployed(app) is not None


def _change(
    app: str, before: dict[str, Any] | None, after: dict[str, Any], timeout_s: float, progress: Progress
) -> str:
    """Applies a config to a pool and waits until it is served. Restores the previous config if that fails."""
    # A unique name, so that earlier reports about the same critic are not taken for reports about this publication.
    _replicas(after)["user_config"]["publication"] = uuid.uuid4().hex
    wanted = deployment_hash(_replicas(after)["user_config"])
    found = None if before is None else _hash(before)
    before = before and _at_its_size(app, before)
    if not _apply(app, _at_its_size(app, after), only_if=found):
        raise ConfigError(f"the pool {app!r} was changed or stopped by another process meanwhile")
    try:
        return wait_until_served(app, timeout_s, progress, wanted)
    except BaseException:  # also an interrupt, which would leave replicas with different critics
        if before is not None:
            _apply(app, before, only_if=wanted)
        raise


def _at_its_size(app: str, config: dict[str, Any]) -> dict[str, Any]:
    """Returns a config that keeps the number of replicas. Serve applies the initial number at every deployment."""
    config = copy.deepcopy(config)
    scaling = _replicas(config)["autoscaling_config"]
    *_, target = _state(app)
    scaling["initial_replicas"] = min(max(target, scaling["min_replicas"], 1), scaling["max_replicas"])
    return config


def _published(app: str) -> str | None:
    """Returns the hash of the configuration that a pool was given last, None if there is no pool."""
    deployed = _deployed(app)
    return None if deployed is None else _hash(deployed)


def _hash(config: dict[str, Any]) -> str:
    return deployment_hash(_replicas(config)["user_config"])


def _with_digest(scorer: ScorerConfig) -> ScorerConfig:
    from actors.serving.scorer import check_calibrated  # imports torch and transformers
    from rlhf_critic.checkpoint.reward_model import check_reward_model

    # A link such as ``latest`` may point elsewhere when another replica starts.
    is_local = os.path.isdir(scorer.checkpoint)
    checkpoint = os.path.realpath(scorer.checkpoint) if is_local else scorer.checkpoint
    with local_directory(checkpoint) as directory:
        model = check_reward_model(directory, checkpoint, scorer.encoding)
        if scorer.normalize:
            model.opened.card.reward_scale()
        check_calibrated(scorer, model.opened.posterior() is not None)
    return scorer.model_copy(update={"checkpoint": checkpoint, "digest": model.digest})


def _runtime_environment(use_gpu: bool) -> dict[str, Any]:
    """Returns the ``runtime_env`` of replicas: this process's variables and, in a submitted job, its code."""
    mine = ray.get_runtime_context().runtime_env
    passed_on = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    passed_on |= compute_environment(use_gpu)
    return {**{name: mine[name] for name in ("working_dir", "py_modules") if mine.get(name)}, "env_vars": passed_on}


def _client() -> Any:
    return get_serve_client(raise_if_no_controller_running=True)


def _deployed(app: str) -> dict[str, Any] | None:
    return _configs().get(app)


def _configs() -> dict[str, dict[str, Any]]:
    """Returns the configs of all applications that were deployed by config."""
    client = get_serve_client(raise_if_no_controller_running=False)
    applications = client.get_serve_details()["applications"] if client else {}
    return {
        name: details["deployed_app_config"]
        for name, details in applications.items()
        if details["deployed_app_config"] is not None and details["status"] != ApplicationStatus.DELETING
    }


def _apply(app: str, config: dict[str, Any], only_if: str | None = None) -> bool:
    """Replaces one application's config. Serve stops applications that a config does not name, so all are passed.

    Args:
        app: The pool's name.
        config: Its new entry in Serve's configuration.
        only_if: Replace only the configuration with this hash; see `deployment_hash`.

    Returns:
        Whether the config was replaced.
    """
    with only_writer():
        configs = _configs()
        if only_if is not None and (app not in configs or _hash(configs[app]) != only_if):
            return False
        client = _client()
        http = {"host": client.http_config.host, "port": client.http_config.port}
        configs[app] = config
        client.deploy_apps(ServeDeploySchema(applications=list(configs.values()), http_options=http))
    return True


class _Writer:
    """An actor without methods. Its name belongs to one process at a time, and is free when that process has ended."""


@contextmanager
def only_writer() -> Iterator[None]:
    """Waits until no other process of the cluster writes Serve's configuration, and keeps others from writing.

    Each write contains the configs of all pools. Without it, a write undoes what another process wrote since the read.

    Raises:
        PlacementError: Another process has been writing for too long.
    """
    writer: Any = ray.remote(_Writer).options(
        name="pool-writer", namespace=NAMESPACE, num_cpus=0, resources=ON_HEAD, lifetime="non_detached"
    )
    deadline = time.monotonic() + WRITER_TIMEOUT_S
    while True:
        try:
            turn = writer.remote()
            break
        except ActorAlreadyExistsError as error:
            if time.monotonic() > deadline:
                raise PlacementError(
                    f"another process has been writing Serve's configuration for {WRITER_TIMEOUT_S:g} s: stop it"
                ) from error
            time.sleep(POLL_S)
    try:
        yield
    finally:
        ray.kill(turn)


def _replicas(application: dict[str, Any]) -> dict[str, Any]:
    (replicas,) = (one for one in application["deployments"] if one["name"] == SCORER_DEPLOYMENT)
    return replicas


def _state(app: str) -> tuple[str, str, set[str], int]:
    """Returns an application's status and message, its running replicas, and their target number."""
    details = _client().get_serve_details()["applications"].get(app, {})
    scorers = details.get("deployments", {}).get(SCORER_DEPLOYMENT, {})
    answering = {"RUNNING", "UPDATING"}
    running = {replica["replica_id"] for replica in scorers.get("replicas", []) if replica["state"] in answering}
    message = details.get("message", "") or scorers.get("message", "")
    status = details["status"].value if details else "NOT_STARTED"
    return status, message, running, int(scorers.get("target_num_replicas", 0))


def _last_line(message: str) -> str:
    """Returns the last line of a traceback, which names the error."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return lines[-1] if lines else "no reason given; see the replicas' logs"
