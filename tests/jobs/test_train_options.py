"""Options of a training job: rejected combinations, the plan of a dry run, and early stopping."""

import importlib.util
import json

import numpy as np
import pytest

from jobs import train as train_job
from jobs.cli import RAY_PACKAGE_FOLDER
from jobs.train import compare_seeds, train
from rlhf_critic.checkpoint.critic_directory import load_critic, read_card
from rlhf_critic.config.train import TrainJobConfig
from rlhf_critic.errors import CheckpointError, ConfigError
from tests.helpers import write_preferences
from tests.jobs.command_line import run


def test_checkpoints_do_not_go_into_the_copy_of_a_working_directory(tmp_path, monkeypatch):
    package = tmp_path / RAY_PACKAGE_FOLDER / "_ray_pkg_0"
    package.mkdir(parents=True)
    monkeypatch.chdir(package)
    config = TrainJobConfig.model_validate({"model": {"path": "m"}, "data": {"train": "d"}})
    with pytest.raises(ConfigError, match=r"run\.storage_path: .*/_ray_pkg_0/runs lies in the copy"):
        train(config)


def test_a_run_name_is_one_directory():
    with pytest.raises(ValueError, match="must be a single directory name"):
        TrainJobConfig.model_validate({"run": {"name": "../elsewhere"}})


def test_validation_that_options_need_is_asked_for(monkeypatch):
    common = {"model": {"path": "m"}, "data": {"train": "d"}}
    for options in (
        {"run": {"keep": "best"}},
        {"train": {"early_stopping_patience": 2, "validate_every": 5}},
    ):
        with pytest.raises(ConfigError, match="needs data to validate on"):
            train(TrainJobConfig.model_validate({**common, **options}))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs the wandb package"):
        train(TrainJobConfig.model_validate({**common, "run": {"wandb_project": "p"}}))


def test_a_dry_run_prints_the_plan_and_starts_nothing(tiny_model, preference_file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    arguments = [
        "--model.path",
        tiny_model,
        "--data.train",
        preference_file,
        "--encoding.max-length",
        "64",
        "--dry-run",
    ]
    options = ["--train.global-batch-size", "8", "--train.epochs", "2", "--train.token-budget", "300"]
    code, output, _ = run(train_job.main, [*arguments, *options], monkeypatch, capsys)
    assert code == 0
    rows = [[cell.strip() for cell in line.split("│")[1:3]] for line in output.splitlines() if line.count("│") == 3]
    plan = dict(rows)
    assert plan["optimizer steps"] == "23 of 8 preferences"  # 2 x 90 preferences in batches of 8
    assert plan["shards"] == "1, ZeRO-2, float32"
    tokens, different = (
        int(plan[what].replace(",", "")) for what in ("tokens per step", "computed tokens, with shared prefixes once")
    )
    assert 8 * 2 * 10 < different < tokens <= 8 * 2 * 64
    assert float(plan["micro-batches per step"].split()[0]) >= different / 300
    assert float(plan["memory of a shard (calculated)"].split()[0]) > 0
    sparing = ["--model.freeze-layers", "1", "--train.offload-optimizer", "--model.dtype", "bfloat16"]
    code, output, _ = run(train_job.main, [*arguments, *options, *sparing], monkeypatch, capsys)
    rows = [[cell.strip() for cell in line.split("│")[1:3]] for line in output.splitlines() if line.count("│") == 3]
    parameters, embedding, trained = (
        int(words.split()[-1].replace(",", "")) for words in dict(rows)["parameters"].replace(",  ", ", ").split(", ")
    )
    assert trained < parameters - embedding
    assert "CPU memory of a shard" in dict(rows)
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_seeds_early_stopping_and_the_best_checkpoint(tiny_model, tmp_path, ray_address):
    """Two runs that get worse soon, because the validation data contradicts the training data."""
    write_preferences(tmp_path / "train.jsonl", 60)
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    turned = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows[:20]]
    (tmp_path / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in turned))
    config = TrainJobConfig.model_validate(
        {
            "model": {"path": tiny_model, "freeze_layers": 1},
            "encoding": {"max_length": 48},
            "data": {
                "train": str(tmp_path / "train.jsonl"),
                "validation": str(tmp_path / "validation.jsonl"),
                "cache_dir": str(tmp_path / "cache"),
            },
            "train": {
                "global_batch_size": 6,
                "epochs": 10,
                "learning_rate": 3e-3,
                "warmup_fraction": 0.0,
                "token_budget": 400,
                "validate_every": 3,
                "checkpoint_every": 3,
                "early_stopping_patience": 2,
                "reference": "train",
            },
            "run": {"name": "turned", "storage_path": str(tmp_path / "runs"), "keep_checkpoints": 1, "keep": "best"},
            "seeds": [0, 1],
        }
    )
    table = compare_seeds(config)
    assert [str(cell) for cell in table.columns[0].cells] == ["0", "1", "all"]
    assert "standard deviation" in list(table.columns[1].cells)[-1]
    for seed in (0, 1):
        run_directory = tmp_path / "runs" / f"turned-seed-{seed}"
        history = [json.loads(line) for line in (run_directory / "history" / "metrics.jsonl").read_text().splitlines()]
        validations = {record["step"]: record["log_loss"] for record in history if record["kind"] == "validation"}
        best = min(validations, key=validations.get)
        assert max(validations) == best + 2 * 3 < 100, "stops after two validations without a better one"
        assert {path.name for path in run_directory.glob("step-*")} == {f"step-{step:06d}" for step in (best, best + 6)}
        card = load_critic(run_directory / f"step-{best + 6:06d}").card
        assert card.training["progress"]["best_step"] == best
        assert card.training["options"]["train"]["seed"] == seed
        assert card.reward_reference == f"{tmp_path}/train.jsonl (60 training preferences)"
        rewards = card.normalize(np.array([card.reward_mean, card.reward_mean + card.reward_std]))
        np.testing.assert_allclose(rewards, [0.0, 1.0], atol=1e-6)
        unmeasured = read_card(run_directory / f"step-{best:06d}")  # the mean is measured at the end only
        with pytest.raises(CheckpointError, match="no reward mean and standard deviation to normalise by"):
            unmeasured.normalize(np.zeros(2))
