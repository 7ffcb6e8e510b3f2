"""A critic learns from preferences whose responses call a tool: wrong calls lose, and so do wrong answers."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from jobs.train import checkpoint_of, train
from rlhf_critic.config.train import TrainJobConfig
from tests.helpers import run_command, save_tiny_model
from tests.rlhf_critic.data.agent_rows import TEMPLATE

REPOSITORY = Path(__file__).parents[2]
ROWS, HELD_OUT, STEPS = 5_000, 500, 800
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
SUMS = [(first, second) for first in range(10) for second in range(10 - first) if first != second]  # of one digit
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]


def make_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Returns preferences that a program decided: a wrong response asks for other numbers, or changes the result."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        first, second = rng.choice(SUMS)
        other = rng.choice([number for number in range(10) if number not in (first, second)])
        # The number makes prompts differ: rows of one prompt come together, and would fill whole batches here.
        asked = [{"role": "user", "content": f"{rng.randrange(1000)}) {first}+{second}"}]
        if rng.random() < 0.5:
            wrong = turns(first, other, first + other)
        else:
            wrong = turns(first, second, rng.choice([number for number in range(10) if number != first + second]))
        rows.append(
            {"prompt": asked, "chosen": turns(first, second, first + second), "rejected": wrong, "tools": TOOLS}
        )
    return rows


def turns(first: int, second: int, answer: int) -> list[dict[str, Any]]:
    """Returns the turns of a response: the call, the tool's right result, and an answer."""
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": first, "b": second}}}
    return [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "name": "add", "content": str(first + second)},
        {"role": "assistant", "content": str(answer)},
    ]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_wrong_calls_and_wrong_answers_lose(ray_address, tmp_path):
    model = save_tiny_model(tmp_path / "model", tie_word_embeddings=True, std=0.1, **SHAPE)
    (tmp_path / "template.jinja").write_text(TEMPLATE, encoding="utf-8")
    options = {
        "model": {"path": model},
        "encoding": {"max_length": 256, "chat_template": str(tmp_path / "template.jinja")},
        "data": {"train": write(tmp_path / "train.jsonl", make_rows(ROWS, 0)), "cache_dir": str(tmp_path / "cache")},
        "train": {
            "global_batch_size": 64,
            "max_steps": STEPS,
            "epochs": 12,
            "learning_rate": 1e-3,
            "schedule": "constant",
            "warmup_fraction": 0.1,
            "weight_decay": 0.01,
            "adam_beta2": 0.98,
            "token_budget": 16384,
            "zero_stage": 0,
        },
        "run": {"name": "tools", "storage_path": str(tmp_path / "runs"), "num_workers": 1},
    }
    config = TrainJobConfig.model_validate(options)
    critic = checkpoint_of(config, train(config)).removeprefix("file://")
    held_out = write(tmp_path / "held-out.jsonl", make_rows(HELD_OUT, 1))
    arguments = ["-m", "jobs.evaluate", critic, held_out, "--json-output", "--cache-dir", str(tmp_path / "cache")]
    done = run_command(arguments, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    print({name: measured[name] for name in ("accuracy", "length_baseline", "log_loss")})
    assert measured["accuracy"]["mean"] >= 0.9
    assert measured["accuracy"]["low"] > measured["length_baseline"]["high"]
