"""The cluster files: Ray accepts them, every actor fits a node, the head does no work, and no port is open."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import jsonschema
import pytest
import ray
import yaml
from ray.autoscaler._private.util import validate_config
from ray.runtime_env import RuntimeEnv
from ray.scripts.scripts import start

from actors.serving.deployment import Gateway
from rlhf_critic.config.ppo import PPOJobConfig
from rlhf_critic.config.serve import ScoreJobConfig, ServeJobConfig
from rlhf_critic.config.train import TrainJobConfig
from tests.cluster.clusters import (
    CLOUDS,
    CLUSTER,
    PYPROJECT,
    RAY,
    RAY_UP,
    TOP,
    VERSION,
    cluster_file,
    demand,
    fits,
    nodes_for,
    ray_up,
    spot_types,
    workers,
)
from tests.cluster.fields import AWS_NODE, GCP_NODE

ALL_KINDS = (*CLOUDS, "raycluster")
TEXTS = {path.relative_to(TOP): path.read_text(encoding="utf-8") for path in CLUSTER.rglob("*") if path.is_file()}
DOCKERFILE = TEXTS[Path("cluster/Dockerfile")]
SECRET = re.compile(
    r"AKIA[0-9A-Z]{12}|aws_secret|secret_access_key|-----BEGIN|\bhf_[A-Za-z0-9]{20}|ghp_|AIza|\b[0-9a-f]{40,}\b"
    r"|RAY_AUTH_TOKEN\s*[:=]\s*['\"]?[0-9a-zA-Z]|password\s*[:=]",
    re.IGNORECASE,
)
# Every actor on a GPU, with its default CPUs; a training job on one shard.
DEFAULTS = {
    "a training worker": demand(TrainJobConfig(run={"use_gpu": True})),
    "a scorer": demand(ServeJobConfig(checkpoint="critic", use_gpu=True)),
    "a scorer on CPUs": demand(ServeJobConfig(checkpoint="critic")),
    "a scorer of eight shards": demand(ServeJobConfig(checkpoint="critic", shards=8, use_gpu=True)),
    "a worker of jobs.score": demand(ScoreJobConfig(checkpoint="critic", data="data", out="out", use_gpu=True)),
    "policy, critic, rollout worker and scorer of PPO": demand(
        PPOJobConfig(run={"use_gpu": True}, reward={"checkpoint": "critic"})
    ),
}


def start_options(command: str) -> dict[str, object]:
    """Parses the options of a ``ray start`` command with Ray's command line."""
    words = shlex.split(command)
    return start.make_context("start", words[words.index("start") + 1 :]).params


def head_start(name: str) -> dict[str, object]:
    (command,) = (one for one in ray_up(name)["head_start_ray_commands"] if "ray start" in one)
    return start_options(command)


@pytest.mark.parametrize("name", RAY_UP)
def test_ray_takes_the_file(name):
    validate_config(ray_up(name))


@pytest.mark.parametrize("name", RAY_UP)
def test_the_head_does_no_work(name):
    options = head_start(name)
    assert (options["num_cpus"], options["num_gpus"]) == (0, 0)
    config = ray_up(name)
    if name in CLOUDS:
        head = config["available_node_types"][config["head_node_type"]]
        assert head["resources"] == {"CPU": 0}
        assert head["max_workers"] == 0


@pytest.mark.parametrize("name", RAY_UP)
def test_there_are_never_fewer_nodes_allowed_than_wanted(name):
    config = ray_up(name)
    types = config["available_node_types"].values()
    assert all(0 <= node["min_workers"] <= node["max_workers"] <= config["max_workers"] for node in types)
    assert sum(node["min_workers"] for node in types) <= config["max_workers"]
    assert config["idle_timeout_minutes"] > 0


def test_all_machines_of_the_list_are_used():
    config = cluster_file("on-premise")
    assert config["min_workers"] == config["max_workers"] == len(config["provider"]["worker_ips"])


@pytest.mark.parametrize("name", CLOUDS)
def test_nothing_runs_and_costs_before_a_job_comes(name):
    assert all(node["min_workers"] == 0 for node in workers(name).values())
    assert cluster_file(name)["provider"].get("cache_stopped_nodes", False) is False, "stopped nodes cost their disks"


@pytest.mark.parametrize("name", ALL_KINDS)
@pytest.mark.parametrize("actor", DEFAULTS)
def test_every_actor_fits_a_node(name, actor):
    asked = DEFAULTS[actor]
    for bundle in (*asked.singles, *(bundle for gang in asked.gangs for bundle in gang)):
        assert any(fits(bundle, node) for node in workers(name).values()), f"{bundle} fits no node"
    assert nodes_for(name, asked.gangs, asked.singles)


def test_what_runs_on_the_head_asks_for_no_cpu():
    assert Gateway.ray_actor_options["num_cpus"] == 0


@pytest.mark.parametrize("name", CLOUDS)
def test_gpus_for_training_are_on_demand_and_those_for_scoring_are_spot(name):
    types = workers(name)
    assert spot_types(name) == {"scorers"}
    assert types["trainers"]["resources"]["GPU"] > types["scorers"]["resources"]["GPU"] == 1


@pytest.mark.parametrize(("name", "schema"), [("aws", AWS_NODE), ("gcp", GCP_NODE)])
def test_the_cloud_knows_every_field_of_a_node(name, schema):
    for node in cluster_file(name)["available_node_types"].values():
        jsonschema.validate(node["node_config"], schema)


def test_a_misspelt_field_of_a_node_is_found():
    node = cluster_file("aws")["available_node_types"]["scorers"]["node_config"]
    with pytest.raises(jsonschema.ValidationError, match="InstanceMarketOption"):
        jsonschema.validate({**node, "InstanceMarketOption": {}}, AWS_NODE)


@pytest.mark.parametrize("name", RAY_UP)
def test_the_dashboard_listens_on_loopback(name):
    assert head_start(name)["dashboard_host"] == "127.0.0.1"
    assert head_start(name)["autoscaling_config"], "or the head would never bring a worker"
    assert "0.0.0.0" not in (CLUSTER / f"{name}.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", RAY_UP)
def test_every_node_has_the_token_and_asks_for_it(name):
    config = cluster_file(name)
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    # Ray reads it from the home of the image's user; `ray up` copies it from the home of the local user.
    assert config["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"
    assert not {"head_run_options", "worker_run_options"} & set(config["docker"])


@pytest.mark.parametrize("name", RAY_UP)
def test_nobody_becomes_root_in_the_container(name):
    assert any(one.startswith("--security-opt no-new-privileges") for one in ray_up(name)["docker"]["run_options"])
    config = ray_up(name)
    commands = [*config["setup_commands"], *config["head_setup_commands"], *config["worker_setup_commands"]]
    commands += [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    assert not [one for one in commands if "sudo" in one]
    *_, before_last, last = re.findall(r"^USER (\S+)(.*?)(?=^USER|\Z)", DOCKERFILE, re.MULTILINE | re.DOTALL)
    assert before_last[0] == "root"
    assert "rm -f /usr/bin/sudo" in before_last[1]
    assert last[0] == "ray"


def test_aws_lets_in_whom_our_own_group_lets_in():
    for node in cluster_file("aws")["available_node_types"].values():
        assert node["node_config"]["SecurityGroupIds"], "without one Ray opens port 22 to the world"
        assert node["node_config"]["MetadataOptions"]["HttpTokens"] == "required"


@pytest.mark.parametrize("path", TEXTS, ids=str)
def test_no_secret_is_in_the_file(path):
    # The digest of a token is a placeholder that users replace.
    assert not SECRET.search(re.sub(r"token_sha256: [0-9a-f]{64}\b", "", TEXTS[path]))


@pytest.mark.parametrize(
    "secret", ["AKIAABCDEFGHIJKLMNOP", "aws_secret_access_key = x", "RAY_AUTH_TOKEN: abc", "a" * 64]
)
def test_a_secret_would_be_found(secret):
    assert SECRET.search(secret)


@pytest.mark.parametrize("name", RAY_UP)
def test_all_nodes_mount_the_shared_storage_and_show_it_to_the_container(name):
    config = cluster_file(name)
    (volume,) = (option.removeprefix("--volume ") for option in config["docker"]["run_options"] if "--volume" in option)
    outside, inside = volume.split(":")
    assert outside == inside == "/mnt/rlhf"
    assert any(re.search(rf"mount -t nfs\S* .* {outside}$", command) for command in config["initialization_commands"])


@pytest.mark.parametrize("name", RAY_UP)
def test_the_nodes_install_this_version(name):
    config = cluster_file(name)
    wheel = f"rlhf_critic-{VERSION}-py3-none-any.whl"
    assert config["setup_commands"] == [f"pip install --no-cache-dir /home/ray/wheels/{wheel}"]
    assert config["file_mounts"]["/home/ray/wheels"] == "dist"
    assert config["docker"]["image"].endswith(f"/rlhf-critic:{VERSION}")


def test_the_image_has_the_ray_that_the_project_wants():
    (version,) = re.findall(r"^ARG RAY_VERSION=(\S+)$", DOCKERFILE, flags=re.MULTILINE)
    (base,) = re.findall(r"^FROM (\S+)$", DOCKERFILE, flags=re.MULTILINE)
    assert base == "rayproject/ray:${RAY_VERSION}-py311-gpu"
    assert version in RAY.specifier
    assert version.split(".")[:2] == ray.__version__.split(".")[:2], "the one that these tests run with"


def test_the_image_gets_all_packages_and_nothing_else():
    packages = re.search(r"^include = \[(.*?)\]", PYPROJECT, flags=re.MULTILINE)[1].split('"')[1::2]
    copied = {word for line in re.findall(r"^COPY (.*)$", DOCKERFILE, re.MULTILINE) for word in line.split()[1:-1]}
    assert copied == {"pyproject.toml", "README.md", "LICENSE", *(one.rstrip("*") for one in packages)}
    ignored = (TOP / ".dockerignore").read_text(encoding="utf-8").split("\n")
    assert "*" in ignored
    assert {line[1:] for line in ignored if line.startswith("!")} == copied


def test_the_image_runs_as_nobody_special_and_wants_a_token():
    assert re.findall(r"^USER (\S+)$", DOCKERFILE, flags=re.MULTILINE)[-1] == "ray"
    assert "RAY_AUTH_MODE=token" in DOCKERFILE


def test_a_job_takes_the_code_along_and_nothing_large():
    env = yaml.safe_load((CLUSTER / "job-env.yaml").read_text(encoding="utf-8"))
    RuntimeEnv(**env)
    assert {".git", ".venv", ".cache", "runs", "dist"} <= set(env["excludes"])
    assert not {"rlhf_critic", "actors", "jobs"} & set(env["excludes"])
