"""Starting, changing and ending a pool of scorers: what to tell Ray Serve, and how to see that it was done.

A pool is deployed as a Serve config, the declarative way of Ray's own ``serve deploy``: a config that differs only in
options or in what is served reaches running replicas without restarting them, which Serve's Python API cannot do. The
config is handed to Serve's controller as ``serve run CONFIG`` does. Knows nothing of command lines.
"""

from __future__ import annotations

import copy
import ipaddress
import os
import time
import uuid
from collections.abc import Callable
from typing import Any

import ray
from ray import serve
from ray.serve.config import HTTPOptions
from ray.serve.schema import ApplicationStatus, ServeDeploySchema

from actors.runtime.ray_internals import get_serve_client
from actors.runtime.storage import local_directory
from actors.serving.deployment import digest_of
from actors.serving.handle import DEFAULT_APP, SCORER_DEPLOYMENT
from actors.serving.replica_status import read_board, remove_board
from rlhf_critic.config.serve import ScorerConfig, ServeJobConfig
from rlhf_critic.errors import CheckpointError, ConfigError, PlacementError

POLL_S = 0.2
SEQUENCER_CPUS = 0.1
# What replicas need of the environment of whoever starts them.
PASSED_ON = ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "TOKENIZERS_PARALLELISM")
REMOTE_ENVIRONMENT = ("working_dir", "py_modules")

Progress = Callable[[str], None]


def is_loopback(host: str) -> bool:
    """Whether a host that one listens on can be reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def route_of(app: str) -> str:
    """Where a pool's endpoints are: at the root, or, where there are several pools, under their names."""
    return "/" if app == DEFAULT_APP else f"/{app}"


def start_serve(config: ServeJobConfig, authenticated: bool) -> str:
    """Makes sure that Serve runs, and says where the pool's HTTP will be.

    Raises:
        ConfigError: Serve runs already, reachable from other machines, and no token is wanted.
    """
    # Not `http_options.host` alone: Serve takes the options of whoever starts it first.
    serve.start(http_options=HTTPOptions(host=config.host, port=config.port))
    actual = _client().http_config
    if not is_loopback(actual.host) and not authenticated and config.auth != "off":
        raise ConfigError(
            f"Ray Serve listens on {actual.host}, which other machines reach, so callers must show a token: --auth on "
            "(or --auth off, if something before it asks for one)"
        )
    return f"http://{actual.host}:{actual.port}{route_of(config.app)}".rstrip("/")


def checked(config: ServeJobConfig, checkpoint: str) -> ScorerConfig:
    """What replicas are to serve, once it is known to be whole.

    Raises:
        CheckpointError: The critic is not whole, or lacks what the options need.
        ConfigError: The components are wrong.
    """
    scorer = config.scorer_config(checkpoint, "")
    return _with_digest(scorer)


def deploy(config: ServeJobConfig, scorer: ScorerConfig, token_sha256: str | None, progress: Progress) -> str:
    """Runs the pool, or changes the one that runs, which goes on with what it had where that cannot be done.

    Returns:
        The version that every replica serves now.

    Raises:
        CheckpointError: The critic cannot be served.
        PlacementError: Not every replica served it in time.
        ConfigError: Somebody else changed the pool meanwhile.
    """
    after = {**application(config, scorer, token_sha256), "runtime_env": _runtime_environment(config.use_gpu)}
    return _change(config.app, _deployed(config.app), after, config.start_timeout_s, progress)


def application(config: ServeJobConfig, scorer: ScorerConfig, token_sha256: str | None) -> dict[str, Any]:
    """The pool as Ray Serve's configuration has it, less what depends on who starts it.

    Args:
        config: What the user wants.
        scorer: What replicas are told to serve.
        token_sha256: See `actors.serving.http_api.HttpSettings`.
    """
    user_config = {
        "scorer": scorer.model_dump(mode="json"),
        "shards": config.shards,
        "cpus_per_shard": config.cpus_per_shard,
        "use_gpu": config.use_gpu,
    }
    replicas: dict[str, Any] = {
        "name": SCORER_DEPLOYMENT,
        "autoscaling_config": {
            "min_replicas": config.min_replicas,
            "max_replicas": config.max_replicas,
            "initial_replicas": max(1, config.min_replicas),
            "target_ongoing_requests": config.target_ongoing_requests,
            "upscale_delay_s": config.upscale_delay_s,
            "downscale_delay_s": config.downscale_delay_s,
            "metrics_interval_s": min(2.0, max(0.1, config.upscale_delay_s / 2)),
            "look_back_period_s": min(10.0, max(0.5, config.upscale_delay_s)),
        },
        "max_ongoing_requests": config.max_ongoing_requests,
        "max_queued_requests": config.max_queued_requests,
        "user_config": user_config,
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
        "max_body_bytes": config.max_body_bytes,
        "deadline_s": config.deadline_s,
    }
    gateway = {"name": "Gateway", "user_config": {"http": http, "max_items": config.max_items}}
    return {
        "name": config.app,
        "route_prefix": route_of(config.app),
        "import_path": "actors.serving.deployment:app",
        "deployments": [replicas, gateway],
    }


def publish(app: str, checkpoint: str, timeout_s: float, progress: Progress) -> str:
    """Swaps the critic of a running pool; the other options stay.

    Returns:
        The version that every replica serves now.

    Raises:
        ConfigError: There is no such pool, or somebody else changed it meanwhile.
        CheckpointError: The critic cannot be served; the pool goes on with what it had.
        PlacementError: Not every replica served it in time; the pool goes on with what it had.
    """
    before = _deployed(app)
    if before is None:
        raise ConfigError(f"there is no pool {app!r} to publish to: start it with python -m jobs.serve {checkpoint}")
    after = copy.deepcopy(before)
    user_config = _replicas(after)["user_config"]
    scorer = ScorerConfig(**{**user_config["scorer"], "checkpoint": checkpoint})
    user_config["scorer"] = _with_digest(scorer).model_dump(mode="json")
    return _change(app, before, after, timeout_s, progress)


def wait_until_served(app: str, timeout_s: float, progress: Progress, wanted: str | None = None) -> str:
    """Waits until every replica of a pool serves what it was told to.

    A replica that was being started when it was told is not waited for: it comes with what was there before, names
    that in its answers, and swaps then.

    Args:
        app: The pool's name.
        timeout_s: For how long.
        progress: Is told how far it is.
        wanted: The digest of what it was told to serve; None takes what it was told last.

    Returns:
        The version.

    Raises:
        CheckpointError: One cannot.
        PlacementError: They did not in time.
        ConfigError: It was told to serve something else meanwhile.
    """
    deadline = time.monotonic() + timeout_s
    wanted = wanted or _published(app)
    while True:
        if (published := _published(app)) != wanted:
            what = "ended" if published is None else "changed"
            raise ConfigError(f"the pool {app!r} was {what} by somebody else meanwhile")
        status, message, running, target = _state(app)
        reports = [report for report in read_board(app) if report.replica in running and report.published == wanted]
        for report in reports:
            if report.error:
                raise CheckpointError(f"a replica cannot serve what was published: {report.error}")
        current = [report for report in reports if report.is_current]
        progress(f"{len(current)} of {max(len(running), target)} replicas serve it ({status})")
        if status == "DEPLOY_FAILED":
            raise CheckpointError(f"the pool could not be started: {_last_line(message)}")
        if status == "RUNNING" and running and len(current) == len(running):
            return current[0].info.model_version
        if time.monotonic() > deadline:
            why = f"{status}: {_last_line(message)}" if message else status
            raise PlacementError(
                f"waited {timeout_s:g} s for the replicas of {app!r} to serve what was published, and {len(current)} "
                f"of {max(len(running), target)} do ({why}): give the cluster more room, the pool fewer replicas, or "
                "wait longer (--start-timeout-s)"
            )
        time.sleep(POLL_S)


def stop(app: str) -> None:
    """Ends a pool, when its replicas have answered what they had.

    Raises:
        ConfigError: There is no such pool.
    """
    if _deployed(app) is None:
        raise ConfigError(f"there is no pool {app!r} to stop")
    remove_board(app)  # first: if this is killed in between, there still is a pool to be stopped, and not a board alone
    serve.delete(app)


def is_running(app: str) -> bool:
    """Whether there is such a pool."""
    return _deployed(app) is not None


def _change(
    app: str, before: dict[str, Any] | None, after: dict[str, Any], timeout_s: float, progress: Progress
) -> str:
    """Gives a pool a config and waits until it is served; where it comes to nothing, gives back the one before."""
    # A name of its own, so that what replicas said of the same critic earlier is not taken for their answer to this.
    _replicas(after)["user_config"]["publication"] = uuid.uuid4().hex
    wanted = digest_of(_replicas(after)["user_config"])
    before = None if before is None else _at_its_size(app, before)
    _apply(app, _at_its_size(app, after))
    try:
        return wait_until_served(app, timeout_s, progress, wanted)
    except BaseException:  # an interrupt, too: half of the replicas would serve the one and half the other
        if before is not None and _published(app) == wanted:
            _apply(app, before)
        raise


def _at_its_size(app: str, config: dict[str, Any]) -> dict[str, Any]:
    """A pool's config that leaves it as many replicas as it has: Serve goes back to the initial number with each."""
    config = copy.deepcopy(config)
    scaling = _replicas(config)["autoscaling_config"]
    *_, target = _state(app)
    scaling["initial_replicas"] = min(max(target, scaling["min_replicas"], 1), scaling["max_replicas"])
    return config


def _published(app: str) -> str | None:
    """The digest of what a pool was told to serve."""
    deployed = _deployed(app)
    return None if deployed is None else digest_of(_replicas(deployed)["user_config"])


def _with_digest(scorer: ScorerConfig) -> ScorerConfig:
    from rlhf_critic.checkpoint.critic_directory import (  # torch and transformers, for this alone
        check_critic,
        weights_digest,
    )

    with local_directory(scorer.checkpoint) as directory:
        card = check_critic(directory)
        if scorer.normalize:
            card.reward_scale()
        return scorer.model_copy(update={"digest": weights_digest(directory)})


def _runtime_environment(use_gpu: bool) -> dict[str, Any]:
    """The environment of whoever starts the pool, as far as replicas need it: a submitted job's code comes along."""
    mine = ray.get_runtime_context().runtime_env
    passed_on = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    if not use_gpu:
        passed_on["DS_ACCELERATOR"] = "cpu"
    return {**{name: mine[name] for name in REMOTE_ENVIRONMENT if mine.get(name)}, "env_vars": passed_on}


def _client() -> Any:
    return get_serve_client(raise_if_no_controller_running=True)


def _deployed(app: str) -> dict[str, Any] | None:
    """The config that a pool was deployed with."""
    return _configs().get(app)


def _configs() -> dict[str, dict[str, Any]]:
    """The configs of all applications that were deployed by config."""
    client = get_serve_client(raise_if_no_controller_running=False)
    if client is None:
        return {}
    applications = client.get_serve_details()["applications"]
    return {
        name: details["deployed_app_config"]
        for name, details in applications.items()
        if details["deployed_app_config"] is not None and details["status"] != ApplicationStatus.DELETING
    }


def _apply(app: str, config: dict[str, Any]) -> None:
    """Replaces one application's config; Serve would end those that a config does not name."""
    configs = {**_configs(), app: config}
    client = _client()
    client.deploy_apps(
        ServeDeploySchema(
            applications=list(configs.values()),
            http_options={"host": client.http_config.host, "port": client.http_config.port},
        )
    )


def _replicas(application: dict[str, Any]) -> dict[str, Any]:
    (replicas,) = (one for one in application["deployments"] if one["name"] == SCORER_DEPLOYMENT)
    return replicas


def _state(app: str) -> tuple[str, str, set[str], int]:
    """An application's status and message, its replicas that answer, and how many there are to be."""
    details = _client().get_serve_details()["applications"].get(app, {})
    scorers = details.get("deployments", {}).get(SCORER_DEPLOYMENT, {})
    answering = {"RUNNING", "UPDATING"}
    running = {replica["replica_id"] for replica in scorers.get("replicas", []) if replica["state"] in answering}
    message = details.get("message", "") or scorers.get("message", "")
    status = details["status"].value if details else "NOT_STARTED"
    return status, message, running, int(scorers.get("target_num_replicas", 0))


def _last_line(message: str) -> str:
    """Of a traceback, what went wrong."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return lines[-1] if lines else "no reason was given; see the replicas' logs"
