"""The commands of cluster/README.md exist, and add the nodes that the page states."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess

import pytest
from ray.scripts.scripts import cli

from rlhf_critic.config.ppo import PPOJobConfig
from rlhf_critic.config.serve import ServeJobConfig
from rlhf_critic.config.train import TrainJobConfig
from tests.cluster.clusters import (
    CLOUDS,
    CLUSTER,
    TOP,
    commands,
    demand,
    fits,
    job_config,
    nodes_for,
    spot_types,
    workers,
)

README = (CLUSTER / "README.md").read_text(encoding="utf-8")
COMMANDS = commands(README)
JOBS = [config for words in COMMANDS if (config := job_config(words)) is not None]
ALL_KINDS = (*CLOUDS, "raycluster")
BURST = 4  # number of small GPU actors that may be requested at once, according to the page
SHELL = {"&&", "||", "|", ";", ">", ">>"}


def the_job(kind, accept=lambda config: True):
    """Returns the only job of a kind that the page submits."""
    (config,) = (config for config in JOBS if type(config) is kind and accept(config))
    return config


def starts_pool(config):
    return not (config.publish or config.stop)


def ray_commands():
    """Yields the commands of Ray without variables before them; of a submission, the words before the job."""
    for words in COMMANDS:
        start = next((place for place, word in enumerate(words) if "=" not in word), 0)
        if words[start] == "ray":
            end = next((place for place, word in enumerate(words) if word in SHELL | {"--"}), len(words))
            yield tuple(words[start + 1 : end]) + (("--", "true") if "--" in words else ())


def test_the_page_goes_from_training_to_ppo():
    assert {type(config) for config in JOBS} >= {TrainJobConfig, ServeJobConfig, PPOJobConfig}
    assert any(words[:2] == ["ray", "down"] for words in COMMANDS), "and says how to stop"


@pytest.mark.parametrize("words", dict.fromkeys(ray_commands()), ids=" ".join)
def test_ray_knows_the_command_and_its_options(words):
    command, rest = cli, list(words)
    while hasattr(command, "commands"):
        command = command.commands[rest.pop(0)]
    command.make_context(command.name, rest)


@pytest.mark.parametrize("config", JOBS, ids=lambda config: type(config).__name__)
def test_a_submitted_job_writes_where_it_lasts(config):
    """The job must not write into its copy of the working directory, which Ray deletes."""
    run = getattr(config, "run", None)
    assert run is None or run.storage_path.startswith("/mnt/rlhf/")


def test_every_file_that_the_page_names_is_there():
    linked = {CLUSTER / path for path in re.findall(r"\]\(([^)#]+)\)", README)}
    named = {TOP / path for path in re.findall(r"\bcluster/[\w./-]+\w", README) if "*" not in path}
    assert len(linked) > 5
    assert len(named) > 5
    assert [path for path in linked | named if not path.exists()] == []


DIGEST_STEPS = re.search(r"^export TOKEN_FILE=.*?rayservice-scorers.yaml$", README, re.M | re.S)[0]


@pytest.mark.parametrize(
    ("tool", "there"),
    [("", True), ("openssl() { return 127; }", False), ("openssl() { :; }; sha256sum() { return 1; }", False)],
    ids=["all tools", "no openssl", "no sha256sum"],
)
def test_the_steps_that_write_a_digest_write_a_true_one_or_none(tool, there, tmp_path):
    folder = tmp_path / "cluster" / "kuberay"
    folder.mkdir(parents=True)
    manifest = folder / "rayservice-scorers.yaml"
    manifest.write_text("{token_sha256: change-me}")
    script = f"{tool}\n{DIGEST_STEPS}"
    done = subprocess.run(
        ["bash", "-c", script],
        check=False,
        cwd=tmp_path,
        env={**os.environ, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    if not there:
        assert done.returncode != 0
        assert "no token in TOKEN_FILE" in done.stderr
        assert manifest.read_text() == "{token_sha256: change-me}"
        return
    assert done.returncode == 0, done.stderr
    token = tmp_path / ".config" / "rlhf-critic" / "scorer-token"
    assert token.stat().st_mode & 0o077 == 0
    assert manifest.read_text() == f"{{token_sha256: {hashlib.sha256(token.read_bytes()).hexdigest()}}}"


@pytest.mark.parametrize("name", ALL_KINDS)
def test_training_brings_nodes_that_stay(name):
    assert nodes_for(name, demand(the_job(TrainJobConfig)).gangs) == {"trainers": 1}


@pytest.mark.parametrize("name", ALL_KINDS)
@pytest.mark.parametrize("at_once", range(1, BURST + 1))
def test_scorers_bring_small_nodes_one_for_each(name, at_once):
    asked = demand(the_job(ServeJobConfig, starts_pool)).singles[:at_once]
    assert nodes_for(name, singles=asked) == {"scorers": at_once}


@pytest.mark.parametrize("name", ALL_KINDS)
def test_a_burst_of_scorers_brings_a_large_node(name):
    """The page warns about it. If Ray ever chooses otherwise, remove the warning."""
    burst = demand(the_job(ServeJobConfig, starts_pool)).singles
    assert len(burst) == 8
    assert "trainers" in nodes_for(name, singles=burst)


@pytest.mark.parametrize("name", ALL_KINDS)
def test_ppo_brings_one_large_node_for_its_shards_and_small_ones_for_rollouts(name):
    config = the_job(PPOJobConfig)
    asked = demand(config)
    assert nodes_for(name, asked.gangs) == {"trainers": 1}
    assert nodes_for(name, asked.gangs, asked.singles) == {"trainers": 1, "scorers": config.rollout.workers}


@pytest.mark.parametrize("name", ALL_KINDS)
def test_what_trains_fits_no_node_that_the_cloud_may_take_away(name):
    """The preference of the autoscaler is not enough, because Ray would use free GPUs on spot nodes."""
    for kind in (TrainJobConfig, PPOJobConfig):
        for gang in demand(the_job(kind)).gangs:
            assert not any(fits(bundle, workers(name)[spot]) for bundle in gang for spot in spot_types(name))


@pytest.mark.parametrize("name", ALL_KINDS)
def test_with_one_cpu_for_each_gpu_a_small_training_job_would_land_on_spot_nodes(name):
    """This is why the page requests more CPUs. If Ray ever chooses otherwise, simplify the page."""
    config = the_job(TrainJobConfig)
    careless = config.run.model_copy(update={"cpus_per_worker": 1, "num_workers": BURST})
    asked = demand(config.model_copy(update={"run": careless}))
    assert nodes_for(name, asked.gangs) == {"scorers": BURST}


@pytest.mark.parametrize("name", ALL_KINDS)
def test_a_driver_that_computes_goes_to_a_node_without_gpus(name):
    (cpus,) = {
        float(words[words.index("--entrypoint-num-cpus") + 1]) for words in COMMANDS if "--entrypoint-num-cpus" in words
    }
    assert nodes_for(name, singles=[{"CPU": cpus}]) == {"drivers": 1}
