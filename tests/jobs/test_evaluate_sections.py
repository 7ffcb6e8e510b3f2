"""The command reports uncertainty, sensitivity to form, another critic and benchmarks, with the library's figures."""

import json

import numpy as np
import pytest

from jobs import average, calibrate, evaluate
from rlhf_critic.checkpoint.critic_directory import load_critic
from rlhf_critic.errors import ConfigError
from rlhf_critic.evaluation.uncertainty import evaluate_uncertainty
from tests.actors.scorers import save_tiny_critic
from tests.helpers import make_preferences, write_preferences


@pytest.fixture(scope="module")
def critics(tiny_model, tmp_path_factory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("critics")
    return {name: save_tiny_critic(tiny_model, directory / name, seed, f"{name}@1") for seed, name in enumerate("ab")}


@pytest.fixture(scope="module")
def calibrated(critics, tmp_path_factory) -> str:
    """Calibrates the critic ``a`` by the command."""
    directory = tmp_path_factory.mktemp("data")
    data, held_out = (write_preferences(directory / f"{seed}.jsonl", 40, seed) for seed in (1, 2))
    with pytest.MonkeyPatch.context() as patch:
        options = ["--validation", held_out, "--cache-dir", str(directory)]
        patch.setattr("sys.argv", ["jobs.calibrate", critics["a"], data, *options])
        calibrate.main()
    return critics["a"]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    def run_on(critic, rows, *options):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        cache = str(tmp_path / "cache")
        arguments = ["jobs.evaluate", critic, str(path), "--cache-dir", cache, "--json-output", *options]
        monkeypatch.setattr("sys.argv", arguments)
        evaluate.main()
        return json.loads(capsys.readouterr().out)

    return run_on


def test_a_calibrated_critic_reports_its_uncertainty(run, calibrated, tmp_path):
    rows = make_preferences(30, seed=5)
    other = write_preferences(tmp_path / "other.jsonl", 20, seed=6)
    found = run(calibrated, rows, "--other-domain", other)["uncertainty"]
    one = load_critic(calibrated)
    margins, margin_stds, stds = [], [], []
    for row in rows:
        ids = [one.encoder.encode(row["prompt"], row[side]).ids for side in ("chosen", "rejected")]
        rewards, states = one.critic.rewards_and_states(one.critic.batch_of(ids))
        projected = one.posterior.project(states.detach())
        margins.append(float(rewards.detach()[0] - rewards.detach()[1]))
        margin_stds.append(float((projected[0] - projected[1]).norm()))
        stds += projected.norm(dim=1).tolist()
    expected = evaluate_uncertainty(
        np.array(margins), np.array(margin_stds), np.array(stds), one.posterior.temperature
    ).to_dict()
    for name in ("log_loss", "log_loss_uncertain", "error_scaled", "auroc_std", "mean_std"):
        assert found[name] == pytest.approx(expected[name], rel=1e-3)
    assert found["other_domain"]["responses"] == 40
    assert 0 <= found["other_domain"]["auroc"] <= 1


def test_without_calibration_there_is_none(run, critics):
    assert "uncertainty" not in run(critics["b"], make_preferences(10))
    with pytest.raises(ConfigError, match=r"other_domain needs .*rlhf-critic calibrate"):
        run(critics["b"], make_preferences(10), "--other-domain", "other.jsonl")


def test_a_report_measures_sensitivity_to_form(run, critics, tmp_path):
    run(critics["b"], make_preferences(12), "--report", str(tmp_path / "report"))
    health = json.loads((tmp_path / "report" / "metrics.json").read_text())["health"]
    one = load_critic(critics["b"])
    rewards, filled = [], []
    for row in make_preferences(12):
        for text, found in ((row["chosen"], rewards), (f"{row['chosen']} {evaluate_filler()}", filled)):
            batch = one.critic.batch_of([one.encoder.encode(row["prompt"], text).ids])
            found.append(float(one.critic.rewards(batch).detach()))
    shifts = {shift["name"]: shift["shift"]["mean"] for shift in health["shifts"]}
    expected = np.mean(np.subtract(filled, rewards)) / np.std(rewards)
    assert shifts["filler"] == pytest.approx(expected, abs=1e-4)
    assert {"empty answer", "end of a turn inside", "instruction to the judge"} <= shifts.keys()
    assert health["swap_error"] < 1e-4
    assert "Sensitivity to form" in (tmp_path / "report" / "report.html").read_text()


def evaluate_filler() -> str:
    from rlhf_critic.evaluation.health import FILLER

    return FILLER


def test_two_critics_are_compared_on_the_same_preferences(run, critics):
    rows = make_preferences(25)
    first, second = run(critics["a"], rows), run(critics["b"], rows)
    found = run(critics["a"], rows, "--against", critics["b"])["against"]
    assert found["critic"] == "b@1"
    assert found["accuracy"] == pytest.approx([first["accuracy"]["mean"], second["accuracy"]["mean"]])
    difference = first["log_loss"]["mean"] - second["log_loss"]["mean"]
    assert found["log_loss_difference"]["mean"] == pytest.approx(difference, abs=1e-5)


@pytest.mark.parametrize("name", ["rewardbench", "rewardbench2"])
def test_a_benchmark_is_one_command(run, critics, name):
    rows = [
        {
            "prompt": row["prompt"],
            "chosen": row["chosen"],
            "rejected": row["rejected"],
            "subset": "hep-go",
            "id": number,
        }
        for number, row in enumerate(make_preferences(10))
    ]
    if name == "rewardbench2":
        rows = [{**row, "chosen": [row["chosen"]], "rejected": [row["rejected"]]} for row in rows]
    found = run(critics["b"], rows, "--benchmark", name)
    assert found["benchmark"]["total"] == pytest.approx(found["accuracy"]["mean"])
    with pytest.raises(ConfigError, match="leave them out"):
        run(critics["b"], rows, "--benchmark", name, "--against", critics["a"])


def test_an_average_is_one_command(critics, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["jobs.average", *critics.values(), str(tmp_path / "mean")])
    average.main()
    assert "average(a@1, b@1)" in capsys.readouterr().out
    assert load_critic(tmp_path / "mean").card.training["averaged"] == ["a@1", "b@1"]
