"""The files in cluster/ as Ray reads them, the resources that actors request, and the nodes that Ray would add."""

from __future__ import annotations

import copy
import importlib
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from packaging.requirements import Requirement
from pydantic import BaseModel
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.autoscaler_pb2 import GangResourceRequest

from actors.serving import control
from rlhf_critic import __version__
from rlhf_critic.config.base import parse_command_line
from rlhf_critic.config.ppo import PPOJobConfig
from rlhf_critic.config.serve import ScoreJobConfig, ScorerConfig, ServeJobConfig
from rlhf_critic.config.train import TrainJobConfig

TOP = Path(__file__).parents[2]
CLUSTER = TOP / "cluster"
VERSION = __version__
PYPROJECT = (TOP / "pyproject.toml").read_text(encoding="utf-8")
RAY = Requirement(re.search(r'"(ray\[.+?)"', PYPROJECT)[1])
RAY_UP = ("aws", "gcp", "on-premise")
CLOUDS = ("aws", "gcp")  # clouds with node types; a list of machines has none
RAY_MANIFESTS = {"raycluster": (), "rayjob-train": ("rayClusterSpec",), "rayservice-scorers": ("rayClusterConfig",)}

Bundle = dict[str, float]
Gang = list[Bundle]  # placed as a unit


def cluster_file(name: str) -> dict[str, Any]:
    """Reads a cluster file without changes."""
    return yaml.safe_load((CLUSTER / f"{name}.yaml").read_text(encoding="utf-8"))


def ray_up(name: str) -> dict[str, Any]:
    """Reads a cluster file with the defaults that Ray adds."""
    return prepare_config(copy.deepcopy(cluster_file(name)))


def manifest(name: str) -> dict[str, Any]:
    """Reads a Kubernetes object without changes."""
    return yaml.safe_load((CLUSTER / "kuberay" / f"{name}.yaml").read_text(encoding="utf-8"))


def ray_cluster(name: str) -> dict[str, Any]:
    """Returns the Ray cluster that a Kubernetes object is or contains."""
    spec = manifest(name)["spec"]
    for key in RAY_MANIFESTS[name]:
        spec = spec[key]
    return spec


def autoscaling(name: str) -> dict[str, Any]:
    """Returns the autoscaler's config of a cluster on a cloud, or of one on Kubernetes as Ray converts it."""
    if name in RAY_UP:
        return ray_up(name)
    return _derive_autoscaling_config_from_ray_cr(
        {"metadata": {"name": name, "namespace": "default"}, "spec": ray_cluster(name)}
    )


def workers(name: str) -> dict[str, dict[str, Any]]:
    """Returns the node types without the head."""
    config = autoscaling(name)
    return {kind: node for kind, node in config["available_node_types"].items() if kind != config["head_node_type"]}


def spot_types(name: str) -> set[str]:
    """Returns the spot node types; on Kubernetes those that tolerate the spot taint."""
    if name in RAY_UP:
        return {
            kind
            for kind, node in workers(name).items()
            if "InstanceMarketOptions" in node["node_config"]
            or node["node_config"].get("scheduling", {}).get("provisioningModel") == "SPOT"
        }
    return {
        group["groupName"]
        for group in ray_cluster(name)["workerGroupSpecs"]
        if any(one["key"] == "rlhf-critic/spot" for one in group["template"]["spec"].get("tolerations", ()))
    }


def fits(bundle: Bundle, node: dict[str, Any]) -> bool:
    return all(node["resources"].get(kind, 0) >= amount for kind, amount in bundle.items())


def nodes_for(name: str, gangs: Sequence[Gang] = (), singles: Sequence[Bundle] = ()) -> dict[str, int]:
    """Returns the number of nodes per type that Ray's autoscaler would add to an empty cluster.

    Args:
        name: Name of the cluster.
        gangs: Placement groups, each placed as a unit.
        singles: Resources of actors that are requested at the same time.

    Raises:
        AssertionError: Some of the demand would wait forever.
    """
    described = autoscaling(name)
    if name == "aws":  # Ray looks up more resources of a type at start and compares types with them
        for node in described["available_node_types"].values():
            gpu = {"accelerator_type:GPU": 1} if "GPU" in node["resources"] else {}
            node["resources"] = {"memory": 2**30, **gpu, **node["resources"]}
    config = AutoscalingConfig(described, skip_content_hash=True)
    requests = [[ResourceRequestUtil.make(bundle) for bundle in gang] for gang in (*gangs, singles)]
    reply = ResourceDemandScheduler().schedule(
        SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=config.get_node_type_configs(),
            max_num_nodes=config.get_max_num_nodes(),
            gang_resource_requests=[GangResourceRequest(requests=gang) for gang in requests[:-1]],
            resource_requests=ResourceRequestUtil.group_by_count(requests[-1]),
        )
    )
    waiting = [*reply.infeasible_gang_resource_requests, *reply.infeasible_resource_requests]
    assert not waiting, f"no room in {name} for {waiting}"
    return {launch.instance_type: launch.count for launch in reply.to_launch}


def shard(cpus: float, use_gpu: bool) -> Bundle:
    """Returns the resources of a training worker, a rank, a rollout worker or a worker of jobs.score."""
    return {"CPU": cpus, **({"GPU": 1} if use_gpu else {})}


@dataclass(frozen=True)
class Demand:
    """Resources that a job requests: groups that are placed as a unit, and single actors."""

    gangs: tuple[Gang, ...] = ()
    singles: tuple[Bundle, ...] = ()


def demand(config: BaseModel) -> Demand:
    """Returns the demand of a job; for a pool, that of all its replicas."""
    if isinstance(config, TrainJobConfig):
        run = config.run
        return Demand(([shard(run.cpus_per_worker, run.use_gpu)] * run.num_workers,))
    if isinstance(config, ServeJobConfig):
        scorer, _ = control.application(config, ScorerConfig(checkpoint=str(config.checkpoint)), None)["deployments"]
        if "placement_group_bundles" in scorer:
            return Demand((scorer["placement_group_bundles"],) * config.max_replicas)
        options = scorer["ray_actor_options"]
        return Demand(singles=(shard(options["num_cpus"], options["num_gpus"] > 0),) * config.max_replicas)
    if isinstance(config, ScoreJobConfig):
        return Demand(singles=(shard(config.cpus_per_worker, config.use_gpu),) * config.num_workers)
    assert isinstance(config, PPOJobConfig)
    gpu, reward = config.run.use_gpu, config.reward
    return Demand(
        tuple([shard(one.cpus_per_shard, gpu)] * one.shards for one in (config.policy, config.critic)),
        (shard(config.rollout.cpus_per_worker, gpu),) * config.rollout.workers
        + (shard(reward.cpus_per_replica, gpu),) * (reward.max_replicas if reward.checkpoint else 0),
    )


def commands(text: str) -> list[list[str]]:
    """Returns the shell commands in the fenced blocks of a page, each as a list of words."""
    blocks = re.findall(r"^ *```bash\n(.*?)^ *```", text, flags=re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def job_config(words: Sequence[str]) -> BaseModel | None:
    """Returns the options of the job that a command runs, parsed by the job; None if it runs no job."""
    places = [place for place, word in enumerate(words) if word.startswith("jobs.") and words[place - 1] == "-m"]
    if not places:
        return None
    module = importlib.import_module(words[places[0]])
    (config_class,) = set(re.findall(r"parse_command_line\((\w+)", Path(module.__file__).read_text(encoding="utf-8")))
    try:
        return parse_command_line(getattr(module, config_class), words[places[0] + 1 :])
    except SystemExit as error:  # it would end the tests
        raise AssertionError(f"no such options: {' '.join(words)}") from error
