"""The demos: policies improve, proxies are trained, and what is measured is what the pages say."""

import json
from pathlib import Path

import numpy as np
import pytest

from jobs.demos.overoptimisation_demo import best_of_n
from jobs.demos.overoptimisation_ppo import EOS, FIRST_GOOD, GOOD, gold
from tests.helpers import run_command

REPOSITORY = Path(__file__).parents[2]
PROGRAM = """
import json, pathlib
from jobs.demos import critic_demo, overoptimisation_ppo, tiny_ppo

if __name__ == "__main__":
    tiny_ppo.start_process()
    tiny_ppo.save_model(pathlib.Path("model"), critic_demo.WORDS)
    runs = {method: critic_demo.run(pathlib.Path(), method, 3, 12) for method in ("critic", "RLOO, groups of 8")}
    pathlib.Path("runs.json").write_text(json.dumps(runs))
    tiny_ppo.save_model(pathlib.Path("words") / "model", overoptimisation_ppo.WORDS)
    words = pathlib.Path("words")
    proxies = {name: overoptimisation_ppo.run(words, name, 3, 6) for name in ("proxy", "proxy - 2 std")}
    pathlib.Path("proxies.json").write_text(json.dumps(proxies))
"""


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_policies_of_both_demos_learn(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM, encoding="utf-8")
    done = run_command([str(program)], cwd=tmp_path, env={"PYTHONPATH": str(REPOSITORY)}, timeout=900)
    assert done.returncode == 0, done.stderr
    runs = json.loads((tmp_path / "runs.json").read_text(encoding="utf-8"))
    assert len(runs) == 2
    for method, records in runs.items():
        rewards = [one["reward"] for one in records]
        # A policy that chooses at random answers one key of two, four words of twenty-six: 0.15.
        assert sum(rewards[:2]) / 2 < 0.25, (method, rewards)
        assert sum(rewards[-3:]) / 3 > 0.3, (method, rewards)
    proxies = json.loads((tmp_path / "proxies.json").read_text(encoding="utf-8"))
    first = {method: records[0] for method, records in proxies.items()}
    assert len({one["gold"] for one in first.values()}) == 1, "all start from one policy"
    expected = first["proxy"]["reward"] - 2 * first["proxy"]["std"]
    assert first["proxy - 2 std"]["reward"] == pytest.approx(expected, abs=1e-4)
    for method, records in proxies.items():
        assert records[-1]["reward"] > records[0]["reward"], method


def test_the_gold_rule_counts_different_good_words():
    other = FIRST_GOOD + GOOD
    assert gold(np.array([FIRST_GOOD, FIRST_GOOD + 1, EOS])) == 2
    assert gold(np.array([FIRST_GOOD, FIRST_GOOD, other])) == 1 - 0.5
    assert gold(np.array([EOS])) == 0


def test_the_best_of_n_is_that_of_many_draws():
    rng = np.random.default_rng(0)
    score_T, gold_T = rng.standard_normal((2, 50))
    for n in (1, 3, 20):
        drawn = rng.integers(0, 50, (200_000, n))
        chosen = drawn[np.arange(len(drawn)), score_T[drawn].argmax(axis=1)]
        assert best_of_n(score_T, gold_T, n) == pytest.approx(gold_T[chosen].mean(), abs=0.01)
