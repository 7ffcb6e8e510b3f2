"""Judgements that people give on a pool's page train its critic, which the pool then serves."""

from pathlib import Path

import httpx
import pytest

from actors.serving import control
from rlhf_critic.config.serve import ServeJobConfig
from tests.helpers import make_preferences, run_command

APP = ("--app", "judged")


def command(arguments: list[str], folder: Path, ray_address: str) -> str:
    done = run_command(["-m", "jobs.main", *arguments], folder, {"RAY_ADDRESS": ray_address})
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_judgements_train_the_critic_that_the_pool_then_serves(serve_port, critics, ray_address, tmp_path):
    judgements = [(row["prompt"], row["chosen"], row["rejected"]) for row in make_preferences(48)]
    control.start_serve(ServeJobConfig(checkpoint="-", port=serve_port), authenticated=False)
    options = ["--collect", "judged.jsonl", "--port", str(serve_port), *APP]
    command(["serve", critics["first"], *options], tmp_path, ray_address)
    with httpx.Client(base_url=f"http://127.0.0.1:{serve_port}/judged", timeout=60) as client:
        for prompt, chosen, rejected in judgements:
            body = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "judge": "Ada"}
            client.post("/judgements", json=body).raise_for_status()
        before, version = right_answers(client, judgements)

        training = ["--data.train", "judged.jsonl", "--run.name", "judged", "--run.num-workers", "1"]
        training += ["--train.epochs", "20", "--train.learning-rate", "3e-3", "--train.global-batch-size", "16"]
        training += ["--encoding.max-length", "64"]
        command(["train", "--model.path", critics["first"], *training], tmp_path, ray_address)
        (checkpoint,) = (tmp_path / "runs" / "judged").glob("step-*")
        said = command(["serve", str(checkpoint), "--publish", *APP], tmp_path, ray_address)
        assert "every replica of 'judged' serves" in said

        after, newer = right_answers(client, judgements)
    assert newer != version
    assert before < 0.8
    assert after >= 0.95
    command(["serve", "--stop", *APP], tmp_path, ray_address)


def right_answers(client: httpx.Client, judgements: list[tuple[str, str, str]]) -> tuple[float, str]:
    """Returns the share of judgements that the pool agrees with, and the version that answered."""
    items = [{"prompt": prompt, "response": text} for prompt, *texts in judgements for text in texts]
    answer = client.post("/score", json={"items": items}).raise_for_status().json()
    rewards = answer["rewards"]
    right = [chosen > rejected for chosen, rejected in zip(rewards[::2], rewards[1::2], strict=True)]
    return sum(right) / len(right), answer["model_version"]
