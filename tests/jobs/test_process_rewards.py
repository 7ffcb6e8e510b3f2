"""A critic learns from labels of steps and of outcomes, which a program made, and finds the first wrong step."""

import json
from pathlib import Path

import numpy as np
import pytest

from jobs.train import checkpoint_of, train
from rlhf_critic.config.train import TrainJobConfig
from rlhf_critic.evaluation.pointwise import area_under_roc
from tests.arithmetic_steps import make_problems, outcomes
from tests.helpers import run_command, save_tiny_model

REPOSITORY = Path(__file__).parents[2]
PROBLEMS, HELD_OUT, STEPS = 20_000, 1_000, 3_000
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_first_wrong_step_is_found_and_outcomes_are_judged_better_than_by_length(ray_address, tmp_path):
    solutions, held_out = (make_problems(*one, steps=(2, 4)) for one in ((PROBLEMS, 0), (HELD_OUT, 1)))
    model = save_tiny_model(tmp_path / "model", tie_word_embeddings=True, std=0.02, **SHAPE)
    options = {
        "model": {"path": model},
        "encoding": {"max_length": 64, "chat_template": "plain"},
        "data": {
            "train": [
                write(tmp_path / "steps.jsonl", solutions),
                write(tmp_path / "outcomes.jsonl", outcomes(solutions[: PROBLEMS // 10])),
            ],
            "cache_dir": str(tmp_path / "cache"),
        },
        "train": {
            "global_batch_size": 64,
            "max_steps": STEPS,
            "epochs": 20,
            "learning_rate": 3e-3,
            "warmup_fraction": 0.05,
            "weight_decay": 0.01,
            "adam_beta2": 0.98,
            "token_budget": 4096,
            "zero_stage": 0,
        },
        "run": {"name": "arithmetic", "storage_path": str(tmp_path / "runs"), "num_workers": 1},
    }
    config = TrainJobConfig.model_validate(options)
    critic = checkpoint_of(config, train(config)).removeprefix("file://")

    def evaluated(rows: list[dict], name: str) -> dict:
        data = write(tmp_path / f"{name}.jsonl", rows)
        arguments = ["-m", "jobs.evaluate", critic, data, "--json-output", "--cache-dir", str(tmp_path / "cache")]
        done = run_command(arguments, cwd=REPOSITORY)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    steps = evaluated(held_out, "held-out-steps")["steps"]
    print({name: steps[name] for name in ("first_wrong_f1", "first_wrong_found", "correct_found", "auc")})
    assert steps["first_wrong_found"]["mean"] >= 0.8
    assert steps["correct_found"]["mean"] >= 0.8
    judged = outcomes(held_out)
    is_true = np.array([row["label"] for row in judged])
    by_length = area_under_roc(np.array([float(len(row["response"])) for row in judged]), is_true).mean
    label = evaluated(judged, "held-out-outcomes")["label"]
    print(label["auc"], "by length", by_length)
    assert label["auc"]["low"] > max(by_length, 1 - by_length)
