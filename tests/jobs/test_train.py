"""The training job as a user runs it: submitted, interrupted, resumed, rejected; and its results."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import ray
import torch
from safetensors.torch import load_file

from jobs.train import checkpoint_of, train
from rlhf_critic.checkpoint.critic_directory import load_critic, read_card
from rlhf_critic.checkpoint.export import export_critic
from rlhf_critic.config.train import TrainJobConfig
from rlhf_critic.errors import CheckpointError, ConfigError, DataError, NonFiniteLossError, PlacementError
from rlhf_critic.files import verify_manifest
from tests.helpers import run_command, slow_except, submit_job, wait_until, write_preferences

REPOSITORY = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(600)  # a hang guard: a run may take minutes on a busy machine
STEPS, CHECKPOINT_EVERY, KILL_AFTER = 30, 10, 12


@pytest.fixture(scope="module")
def validation_file(tmp_path_factory) -> str:
    return write_preferences(tmp_path_factory.mktemp("data") / "validation.jsonl", 40, seed=9)


@pytest.fixture(scope="module")
def options(tiny_model, preference_file, validation_file, tmp_path_factory) -> dict:
    """A small real run on 2 shards at ZeRO stage 2."""
    return {
        "model": {"path": tiny_model},
        "encoding": {"max_length": 64},
        "data": {
            "train": preference_file,
            "validation": validation_file,
            "cache_dir": str(tmp_path_factory.mktemp("cache")),
        },
        "train": {
            "global_batch_size": 6,
            "max_steps": STEPS,
            "epochs": 8,
            "learning_rate": 3e-3,
            "token_budget": 300,
            "checkpoint_every": CHECKPOINT_EVERY,
            "validate_every": 25,
            "uncertainty": True,
        },
        "run": {"num_workers": 2, "storage_path": f"file://{tmp_path_factory.mktemp('storage')}", "max_failures": 1},
    }


def config_of(options: dict, **changes: dict) -> TrainJobConfig:
    """The options with changed sections."""
    sections = {name: {**section, **changes.get(name, {})} for name, section in options.items()}
    return TrainJobConfig.model_validate({**sections, "resume": changes.get("resume", False)})


def storage_of(options: dict) -> Path:
    return Path(options["run"]["storage_path"].removeprefix("file://"))


def history_of(run: Path, kind: str = "train") -> list[dict]:
    path = run / "history" / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [record for record in records if record["kind"] == kind]


def assert_same_run(run: Path, expected: Path) -> None:
    """Checks for equal weights, and for every step once in the history with equal numbers."""
    last = f"step-{STEPS:06d}"
    weights, expected_weights = (load_file(directory / last / "model.safetensors") for directory in (run, expected))
    assert weights.keys() == expected_weights.keys()
    for name, tensor in expected_weights.items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-6)
    history, expected_history = history_of(run), history_of(expected)
    assert [record["step"] for record in history] == list(range(1, STEPS + 1))
    for record, other in zip(history, expected_history, strict=True):
        for name in record.keys() - {"kind", "tokens_per_second"}:
            assert record[name] == pytest.approx(other[name], rel=1e-6), (name, record["step"])


def train_workers(root: psutil.Process) -> list[psutil.Process]:
    found = []
    for process in root.children(recursive=True):
        with suppress(psutil.Error):  # one that is ending
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
    return sorted(found, key=lambda process: process.pid)


def name_of(process: psutil.Process) -> str:
    """Returns the name of a process, or an empty string after its end."""
    try:
        return process.name()
    except psutil.NoSuchProcess:
        return ""


@pytest.fixture(scope="module")
def submitted(options, ray_address) -> tuple[Path, str]:
    """A run submitted through the Jobs API with a config file: its directory and its output."""
    config = storage_of(options) / "config.yaml"
    config.write_text(json.dumps(options))  # JSON is YAML
    dashboard = "http://" + ray._private.worker.global_worker.node.address_info["webui_url"]
    finished = submit_job(dashboard, ["jobs.train", "--config", str(config), "--run.name", "submitted"])
    output = finished.stdout + finished.stderr
    assert finished.returncode == 0, output[-4000:]
    return storage_of(options) / "submitted", output


def test_a_submitted_job_trains_and_tells_the_user(submitted):
    run, output = submitted
    assert "succeeded" in output
    assert f"trained {STEPS} steps" in output
    assert "training: loss" in output
    assert output.count("train.jsonl: 90 preferences") == 1
    assert "Reporting training result" not in output
    accuracy = float(re.search(r"validation accuracy (\d\.\d+)", output).group(1))
    assert accuracy > 0.9
    assert [record["step"] for record in history_of(run, "validation")] == [25, STEPS]
    assert history_of(run, "validation")[-1]["accuracy"] == pytest.approx(accuracy, abs=1e-3)
    assert list((run / "history" / "tensorboard").glob("events.*"))
    kept = sorted(path.name for path in run.glob("step-*"))
    assert kept == [f"step-{STEPS - CHECKPOINT_EVERY:06d}", f"step-{STEPS:06d}"]
    critic = load_critic(run / kept[-1])
    card = critic.card
    # It is saved where it makes the validation preferences more likely.
    assert output.count("posterior: seconds=") == 1
    assert (critic.posterior is None) == ("posterior: not saved" in output)
    assert card.version == f"submitted@{STEPS}"
    assert card.reward_std > 0
    older = read_card(run / kept[0])  # it was not validated, and does not take the figures of an earlier step
    assert older.reward_std is None
    assert older.training["evaluation"] is None
    assert card.training["evaluation"]["accuracy"]["mean"] == pytest.approx(accuracy, abs=1e-3)


def test_the_result_evaluates_and_exports_from_the_command_line(submitted, options, tmp_path):
    run, _ = submitted
    checkpoint = str(run / f"step-{STEPS:06d}")
    evaluated = run_command(
        [
            "-m",
            "jobs.evaluate",
            checkpoint,
            options["data"]["validation"],
            "--json-output",
            "--cache-dir",
            str(tmp_path),
        ],
        cwd=REPOSITORY,
    )
    assert evaluated.returncode == 0, evaluated.stderr
    recorded = history_of(run, "validation")[-1]
    assert json.loads(evaluated.stdout)["log_loss"]["mean"] == pytest.approx(recorded["log_loss"], abs=1e-5)
    exported = run_command(["-m", "jobs.export", checkpoint, str(tmp_path / "out"), "--auto-map"], cwd=REPOSITORY)
    assert exported.returncode == 0, exported.stderr
    assert "trust_remote_code=True" in exported.stdout
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"model.safetensors", "config.json", "critic.json", "modeling_llama_reward.py"} <= files


@pytest.mark.slow
def test_a_run_of_which_ray_train_knows_no_checkpoint_has_come_to_its_end_nevertheless(submitted, options):
    """A run whose last worker was lost after it saved its checkpoint and before it reported."""
    run = storage_of(options) / "untold"
    shutil.copytree(submitted[0], run)
    (run / "checkpoint_manager_snapshot.json").unlink()
    config = config_of(options, run={"name": run.name}, resume=True)
    result = train(config)
    assert result.return_value.steps == STEPS
    assert checkpoint_of(config, result) == f"file://{run}/step-{STEPS:06d}"


@pytest.mark.slow
def test_what_a_lost_attempt_left_of_its_first_checkpoint_keeps_no_run_from_starting_again(submitted, options):
    """Files are copied in any order; here the manifest is first."""
    run = storage_of(options) / "barely-begun"
    left = run / f"step-{CHECKPOINT_EVERY:06d}"
    shutil.copytree(submitted[0] / f"step-{STEPS:06d}", left)
    os.truncate(left / "model.safetensors", 1000)
    train(config_of(options, run={"name": run.name, "keep_checkpoints": 9}, resume=True))
    assert_same_run(run, submitted[0])
    verify_manifest(left)


@pytest.mark.slow
def test_a_worker_killed_in_mid_step_changes_nothing(submitted, options):
    run = storage_of(options) / "worker-killed"
    finished: list[object] = []
    job = threading.Thread(target=lambda: finished.append(train(config_of(options, run={"name": run.name}))))
    job.start()
    wait_until(lambda: len(history_of(run)) >= KILL_AFTER, f"{KILL_AFTER} steps")
    victim = train_workers(psutil.Process())[-1]
    victim.send_signal(signal.SIGKILL)
    job.join(timeout=200)
    assert finished, "the job did not survive a killed worker"
    assert not victim.is_running()
    assert_same_run(run, submitted[0])


@pytest.mark.slow
def test_a_worker_killed_while_workers_start_is_replaced_too(ray_address, options):
    run = storage_of(options) / "killed-at-start"
    finished: list[object] = []
    short = config_of(options, run={"name": run.name}, train={"max_steps": 2, "checkpoint_every": 0})
    job = threading.Thread(target=lambda: finished.append(train(short)))
    before = set(train_workers(psutil.Process()))
    job.start()
    wait_until(lambda: set(train_workers(psutil.Process())) - before, "a worker that starts")
    victim = (set(train_workers(psutil.Process())) - before).pop()
    victim.send_signal(signal.SIGKILL)
    job.join(timeout=200)
    assert finished, "the job did not survive a worker killed at its start"
    assert finished[0].return_value.steps == 2
    assert [record["step"] for record in history_of(run)] == [1, 2]


def test_a_resumed_job_goes_on_from_its_last_checkpoint_and_changes_nothing(submitted, options):
    """The job ended behind a checkpoint: steps that follow it are in the history, and are made again."""
    run = storage_of(options) / "resumed"
    shutil.copytree(submitted[0], run)
    shutil.rmtree(run / f"step-{STEPS:06d}")
    (run / "checkpoint_manager_snapshot.json").unlink()  # it names the last one
    assert train(config_of(options, run={"name": run.name}, resume=True)).return_value.steps == STEPS
    assert_same_run(run, submitted[0])


@pytest.mark.slow
def test_a_killed_job_resumes_and_changes_nothing(submitted, options, tmp_path, request):
    run = storage_of(options) / "killed [3], à l'essai"  # DeepSpeed takes brackets for a pattern; metrics take ASCII
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(options))
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    job = psutil.Popen(
        [sys.executable, "-m", "jobs.train", "--config", str(config), "--run.name", run.name],
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_until(lambda: len(history_of(run)) >= KILL_AFTER or job.poll() is not None, f"{KILL_AFTER} steps")
    assert job.poll() is None, "the job ended before it could be killed"
    # Ray's own agents end later; nothing that trains or holds a place in the cluster may remain.
    descendants = job.children(recursive=True)
    working = [process for process in descendants if not name_of(process).startswith(("ray::Dash", "ray::RuntimeEnv"))]
    request.addfinalizer(lambda: [process.kill() for process in descendants if process.is_running()])
    job.send_signal(signal.SIGKILL)
    job.wait(30)
    _, alive = psutil.wait_procs(working, timeout=60)
    assert not alive, "a killed job left processes behind"
    # The state after the machine died during an upload: an incomplete checkpoint.
    last = max(run.glob("step-*"))
    half = run / f"step-{int(last.name.split('-')[1]) + CHECKPOINT_EVERY:06d}"
    shutil.copytree(last, half)
    os.truncate(half / "model.safetensors", 1000)
    (half / "manifest-0-of-1.json").unlink()

    with pytest.raises(CheckpointError, match="manifests"):
        export_critic(half, tmp_path / "out", auto_map=False)

    with pytest.raises(ConfigError, match="continue it with --resume, or choose another"):
        train(config_of(options, run={"name": run.name}))
    result = train(config_of(options, run={"name": run.name}, resume=True))
    assert result.return_value.steps == STEPS
    assert_same_run(run, submitted[0])


@pytest.mark.slow
def test_a_loss_that_is_not_a_number_ends_the_run_and_keeps_the_last_checkpoint(options, validation_file):
    """The data is a blend of two sources, of which a part is held out."""
    exploding = {
        "max_steps": None,
        "learning_rate": 1e30,
        "schedule": "constant",
        "warmup_fraction": 0.0,
        "checkpoint_every": 1,
    }
    sources = [options["data"]["train"], validation_file]
    blend = {"train": sources, "train_weights": [1.0, 0.5], "validation": None, "validation_fraction": 0.1}
    config = config_of(options, run={"name": "exploding"}, train=exploding, data=blend)
    with pytest.raises(NonFiniteLossError) as failed:
        train(config)
    run = storage_of(options) / "exploding"
    assert failed.value.step == len(history_of(run)) >= 1
    assert f"at step {failed.value.step}" in str(failed.value)
    assert all(row.rpartition(":")[0] in sources for row in failed.value.rows)
    last = max(run.glob("step-*"))
    assert last.name == f"step-{failed.value.step:06d}"
    trained_on = load_critic(last).card.training
    assert set(trained_on["train_data"]["reports"]) == set(sources)
    kept = 90 + 40 - 13  # a tenth of the prompts is held out, of either source
    shown = trained_on["total_steps"] * 6 / 8
    assert kept - 40 / 2 <= shown <= kept - (40 - 13) / 2 + 1


@pytest.mark.slow
def test_wrong_data_ends_the_run_without_another_try(options, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "chosen": "b"}\n')
    with pytest.raises(DataError, match=rf"{bad}:1: field 'rejected'"):
        train(config_of(options, run={"name": "bad-data"}, data={"train": str(bad)}))


@pytest.mark.parametrize("fewest", slow_except([{}], [{}, {"min_workers": 64}]))
def test_workers_that_cannot_be_placed_are_waited_for_with_a_deadline(fewest, options):
    too_big = {"name": f"too-big-{len(fewest)}", "num_workers": 64, "start_timeout_s": 3.0}
    config = config_of(options, run={**too_big, **fewest})
    there = r"64 workers with 1 CPU each could not be placed within 3 s .*: the cluster has \d+ CPU\. Ask for fewer"
    with pytest.raises(PlacementError, match=there):
        train(config)
