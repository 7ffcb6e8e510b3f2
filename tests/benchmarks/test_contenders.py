"""Contenders do the same work: stated lengths, same sequences, same scores."""

import numpy as np
import pytest

from benchmarks.harness import Rounds, run
from benchmarks.workloads import PROFILES, draw_prompts, save_model


@pytest.mark.parametrize("profile", PROFILES)
def test_lengths_are_those_of_the_profile(profile):
    shape = PROFILES[profile]
    drawn = draw_prompts(shape, 400, 2)
    prompts = [int(np.argmin(chosen[: len(rejected)] == rejected[: len(chosen)])) for chosen, rejected in drawn]
    responses = [len(chosen) - prompt for prompt, (chosen, _) in zip(prompts, drawn, strict=True)]
    for lengths, stated in ((prompts, shape.prompt), (responses, shape.response)):
        assert stated.low <= min(lengths) <= max(lengths) <= stated.high
        assert 0.85 < np.median(lengths) / stated.median < 1.15
    again = draw_prompts(shape, 400, 2)
    assert all(
        np.array_equal(a, b) for one, other in zip(drawn, again, strict=True) for a, b in zip(one, other, strict=True)
    )


@pytest.mark.slow
def test_both_scorers_score_the_same(tmp_path):
    save_model(tmp_path, layers=1)
    common = {"model": str(tmp_path), "profile": "hh", "n": 3, "prompts": 3, "file": ""}
    ours, plain = (
        run("benchmarks.score_contenders", {**common, **contender}, threads=1)
        for contender in ({"contender": "ours", "token_budget": 300}, {"contender": "plain", "batch_size": 2})
    )
    np.testing.assert_allclose(ours["rewards"], plain["rewards"], rtol=0, atol=1e-5)
    assert len(ours["rewards"]) == 9
    assert ours["distinct_tokens"] < ours["tokens"] == plain["tokens"]


def test_a_contender_that_fails_shows_its_error(tmp_path):
    with pytest.raises(RuntimeError, match="KeyError"):
        run("benchmarks.score_contenders", {"contender": "ours"}, threads=1)


def test_ratios_are_taken_round_by_round():
    rounds = Rounds({"ours": [{"x": 4.0}, {"x": 9.0}, {"x": 1.0}], "peer": [{"x": 2.0}, {"x": 3.0}, {"x": 1.0}]})
    assert rounds.ratios("ours", "peer", "x") == [2.0, 3.0, 1.0]
    assert rounds.median("ours", "x") == 4.0
