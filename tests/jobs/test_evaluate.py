"""The command detects the format of its data, prints and writes the library's figures, and validates options first."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from jobs import evaluate
from rlhf_critic.checkpoint.critic_directory import CriticCard, EncoderCard, load_critic, save_critic
from rlhf_critic.data.encoding import Encoder, load_tokenizer
from rlhf_critic.errors import ConfigError
from rlhf_critic.model.factory import create_critic_model
from rlhf_critic.scoring.local import score_sequences, value_sequences
from tests.helpers import make_preferences, run_command


@pytest.fixture(scope="module")
def critic(tiny_model, tmp_path_factory) -> str:
    """Returns a critic directory with a random head."""
    directory = tmp_path_factory.mktemp("critic")
    encoder = Encoder(load_tokenizer(tiny_model), 200)
    torch.manual_seed(3)
    model = create_critic_model(tiny_model, encoder.tokenizer, None, disable_dropout=True)
    card = CriticCard(version="run@7", encoder=EncoderCard(fingerprint=encoder.fingerprint, max_length=200))
    save_critic(directory, model, encoder, card)
    return str(directory)


@pytest.fixture
def run(critic, tmp_path, monkeypatch, capsys):
    """Runs the command on rows. Returns its output and the path of the rows."""

    def run_on(rows, *options):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        arguments = ["jobs.evaluate", critic, str(path), "--cache-dir", str(tmp_path / "cache"), *options]
        monkeypatch.setattr("sys.argv", arguments)
        monkeypatch.setenv("COLUMNS", "200")
        evaluate.main()
        return capsys.readouterr().out, path

    return run_on


def test_preferences_are_judged_by_subset_and_the_most_wrong_shown(run, critic, tmp_path):
    rows = [{**row, "subset": "ab"[number % 2]} for number, row in enumerate(make_preferences(40))]
    printed, path = run(rows, "--report", str(tmp_path / "report"))
    metrics = json.loads((tmp_path / "report" / "metrics.json").read_text())
    loaded = load_critic(critic)
    sides = [[loaded.encoder.encode(row["prompt"], row[side]).ids for row in rows] for side in ("chosen", "rejected")]
    rewards = score_sequences(loaded.critic, sides[0] + sides[1], 4096).reshape(2, -1)
    margin = rewards[0] - rewards[1]
    assert metrics["critic"] == "run@7"
    assert metrics["evaluation"]["accuracy"]["mean"] == pytest.approx((margin > 0).mean())
    subsets = {one["name"]: one["accuracy"]["mean"] for one in metrics["evaluation"]["subsets"]}
    assert subsets == pytest.approx({"a": (margin[::2] > 0).mean(), "b": (margin[1::2] > 0).mean()})
    assert "length-controlled" in printed
    assert "by subset" in printed
    page = (tmp_path / "report" / "report.html").read_text()
    worst = int(np.argmin(margin))
    assert margin[worst] < 0
    origins = re.findall(r"<h3>(.*:\d+)</h3>", page)
    assert origins[0] == f"{path}:{worst + 1}"
    assert f"margin {margin[worst]:.3f}" in page
    assert "<mark>&lt;/s&gt;</mark>" in page
    assert page.count("<svg") == 3


def test_a_dtype_changes_the_rewards_and_a_missing_gpu_is_named(run, tmp_path):
    rows, metrics = make_preferences(20), []
    for dtype in ("auto", "float32", "bfloat16"):
        run(rows, "--dtype", dtype, "--report", str(tmp_path / dtype))
        metrics.append(json.loads((tmp_path / dtype / "metrics.json").read_text())["evaluation"])
    assert metrics[0] == metrics[1] != metrics[2]
    with pytest.raises(ConfigError, match="torch finds no GPU"):
        run(rows, "--use-gpu")


def test_best_of_n_is_recognised_by_its_first_row(run, tmp_path):
    rows = [
        {
            "prompt": row["prompt"],
            "chosen": [row["chosen"]],
            "rejected": [row["rejected"], "no", "go away"],
            "subset": "s",
        }
        for row in make_preferences(12)
    ]
    printed, _ = run(rows, "--report", str(tmp_path / "report"))
    metrics = json.loads((tmp_path / "report" / "metrics.json").read_text())["evaluation"]
    assert metrics["rows"] == 12
    assert metrics["chance"] == pytest.approx(1 / 4)
    assert "accuracy of random rewards" in printed
    page = (tmp_path / "report" / "report.html").read_text()
    assert "best wrong response, reward" in page
    assert page.count("<svg") == 1


def test_json_output_is_one_object(run):
    printed, _ = run(make_preferences(5), "--json-output")
    assert json.loads(printed)["preferences"] == 5


def test_a_directory_in_use_is_refused_before_anything_is_read(run, tmp_path):
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "precious").write_text("kept")
    with pytest.raises(ConfigError, match=r"report: .*give a new one, or empty it first"):
        run(["not even a preference"], "--report", str(tmp_path / "report"))
    assert (tmp_path / "report" / "precious").read_text() == "kept"


@pytest.mark.parametrize("module", ["jobs.evaluate", "jobs.inspect_data"])
def test_the_command_starts_without_ray_and_deepspeed(module):
    script = f"import {module}, sys; assert not {{'ray', 'deepspeed', 'matplotlib'}} & set(sys.modules)"
    done = run_command(["-c", script], Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr


def test_rows_with_targets_are_measured_by_kind_beside_preferences(run, critic, tmp_path):
    pairs = make_preferences(12)
    steps = [
        {"prompt": row["prompt"], "steps": [{"text": "of course", "label": True}, {"text": "no", "label": number % 2}]}
        for number, row in enumerate(pairs)
    ]
    labels = [
        {"prompt": row["prompt"], "response": row["chosen"], "label": number % 2} for number, row in enumerate(pairs)
    ]
    scores = [{"prompt": row["prompt"], "response": row["chosen"], "score": number} for number, row in enumerate(pairs)]
    printed, _ = run([*steps, *labels, *scores], "--report", str(tmp_path / "report"))
    found = json.loads((tmp_path / "report" / "metrics.json").read_text())["evaluation"]
    loaded = load_critic(critic)
    encoded = [loaded.encoder.encode_steps(row["prompt"], ["of course", "no"]) for row in steps]
    at_tokens = value_sequences(loaded.critic, [one.ids for one in encoded], 4096)
    values = [value_T[list(one.step_tokens)] for value_T, one in zip(at_tokens, encoded, strict=True)]
    right = [(value > 0) == [True, bool(number % 2)] for number, value in enumerate(values)]
    assert found["steps"]["accuracy"]["mean"] == pytest.approx(np.mean(right))
    assert (found["steps"]["steps"], found["label"]["rows"], found["score"]["rows"]) == (24, 12, 12)
    assert "first wrong step, F1" in printed
    assert "Spearman correlation" in printed
    page = (tmp_path / "report" / "report.html").read_text()
    assert "Reliability of steps" in page
    assert "value (target)" in page
    (both, _) = run([*pairs, *labels], "--json-output")
    assert json.loads(both)["preferences"] == json.loads(both)["pointwise"]["rows"] == 12
