"""A run on a cluster that shrinks and grows is the run on one that does not."""

import json
import secrets
from pathlib import Path

import pytest

from jobs.train import train
from rlhf_critic.config import RunConfig, TrainJobConfig
from tests.helpers import run_command

REPOSITORY = Path(__file__).parents[2]
STEPS = 100


def history_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "history" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.timeout(900)
def test_a_run_shrinks_when_a_node_goes_and_grows_when_one_comes(ray_address, tiny_model, preference_file, tmp_path):
    options = {
        "model": {"path": tiny_model},
        "encoding": {"max_length": 64},
        "data": {"train": preference_file, "cache_dir": str(tmp_path / "cache")},
        "train": {
            "global_batch_size": 45,
            "epochs": STEPS / 2,
            "learning_rate": 1e-4,
            "token_budget": 130,  # steps of many micro-batches: the run must last until a node has gone and come
            "checkpoint_every": 10,
        },
        "run": {"name": "elastic", "num_workers": 2, "min_workers": 1, "storage_path": f"file://{tmp_path}/runs"},
    }
    (tmp_path / "options.json").write_text(json.dumps(options))
    environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(), "RAY_ADDRESS": ""}
    arguments = ["-m", "tests.jobs.elastic_run", str(tmp_path / "options.json")]
    finished = run_command(arguments, cwd=REPOSITORY, env=environment, timeout=700)
    assert finished.returncode == 0, finished.stderr[-4000:]
    outcome = json.loads(finished.stdout.splitlines()[-1])
    assert outcome["steps"] == STEPS
    saved_by = [seen["workers"] for seen in outcome["seen"] if seen["what"] == "checkpoint"]
    assert saved_by == [2, 2, 1, 2], outcome

    options["run"] |= {"name": "undisturbed", "num_workers": 1, "min_workers": None}
    options["train"]["token_budget"] = 4000  # the same losses, sooner
    train(TrainJobConfig.model_validate(options))
    runs = [history_of(tmp_path / "runs" / name) for name in ("elastic", "undisturbed")]
    for record, expected in zip(*runs, strict=True):
        assert record["step"] == expected["step"]
        assert record["loss"] == pytest.approx(expected["loss"], rel=1e-4, abs=1e-6), record["step"]


def test_fewer_than_none_and_more_than_all_are_refused():
    assert RunConfig(num_workers=2, min_workers=2).min_workers == 2
    for fewest in (0, 3):
        with pytest.raises(ValueError, match="min_workers"):
            RunConfig(num_workers=2, min_workers=fewest)
