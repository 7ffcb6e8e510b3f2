"""Scorers answer standard deviations from the same forward pass, and serve pessimistic rewards."""

import numpy as np
import pytest

from actors.serving.scorer import Scorer
from rlhf_critic.checkpoint.critic_directory import load_critic, open_critic
from rlhf_critic.checkpoint.posterior_file import save_posterior
from rlhf_critic.config.serve import ScorerConfig, UncertaintyComponent, load_components, with_pessimism
from rlhf_critic.errors import CheckpointError, ConfigError
from rlhf_critic.model.factory import HEAD_NAME
from rlhf_critic.scoring.http_schema import ScoreResponse
from rlhf_critic.training.posterior_fit import fit_head_posterior, last_states_of
from tests.actors.scorers import make_conversations, save_tiny_critic
from tests.helpers import make_preferences


def calibrate(directory: str) -> None:
    """Fits a posterior to made-up preferences and stores it."""
    one = load_critic(directory)
    rows = make_preferences(50)
    units = [[one.encoder.encode(row["prompt"], row[side]).ids for side in ("chosen", "rejected")] for row in rows]
    posterior, report = fit_head_posterior(units[:25], units[25:], last_states_of(one.critic, 512))
    save_posterior(directory, posterior, open_critic(directory).reader.read(HEAD_NAME), report.to_dict())


@pytest.fixture(scope="module")
def plain(tiny_model, tmp_path_factory) -> str:
    return save_tiny_critic(tiny_model, tmp_path_factory.mktemp("critics") / "plain", seed=4)


@pytest.fixture(scope="module")
def calibrated(tiny_model, tmp_path_factory) -> str:
    directory = save_tiny_critic(tiny_model, tmp_path_factory.mktemp("critics") / "calibrated", seed=4)
    calibrate(directory)
    return directory


def answer(checkpoint: str, values: bool = False, **options):
    scorer = Scorer(ScorerConfig(checkpoint=checkpoint, **options))
    try:
        return scorer.score(make_conversations(12), values=values)
    finally:
        scorer.close()


def expected_stds(directory: str) -> np.ndarray:
    one = load_critic(directory)
    found = []
    for item in make_conversations(12):
        ids = one.encoder.encode(*item).ids
        _, states = one.critic.rewards_and_states(one.critic.batch_of([ids]))
        found.append(float(one.posterior.stds(states.detach())))
    return np.array(found)


def test_rewards_stay_and_stds_are_those_of_the_posterior(plain, calibrated):
    before, after = answer(plain), answer(calibrated)
    assert before.stds_S is None
    np.testing.assert_array_equal(after.rewards_S, before.rewards_S)
    assert after.model_version != before.model_version
    np.testing.assert_allclose(after.stds_S, expected_stds(calibrated), rtol=1e-4)
    assert (after.stds_S > 0).all()
    with_values = answer(calibrated, values=True)
    np.testing.assert_allclose(with_values.stds_S, after.stds_S, rtol=1e-4)
    assert [len(values) for values in with_values.values] == after.tokens_S.tolist()
    np.testing.assert_allclose([values[-1] for values in with_values.values], after.rewards_S, atol=1e-5)


def test_over_http_they_are_numbers_or_null(plain, calibrated):
    for scores in (answer(plain), answer(calibrated)):
        response = ScoreResponse.of(scores)
        read = ScoreResponse.model_validate_json(response.model_dump_json()).to_scores()
        assert (read.stds_S is None) == (scores.stds_S is None)
        if scores.stds_S is not None:
            np.testing.assert_array_equal(read.stds_S, scores.stds_S)
            assert list(scores.logs()) == ["std"]


def test_a_pessimistic_reward_reports_its_parts(calibrated):
    components = with_pessimism(load_components(None), 1.5)
    scores = answer(calibrated, components=components)
    plain = answer(calibrated)
    np.testing.assert_allclose(scores.rewards_S, plain.rewards_S - 1.5 * plain.stds_S, atol=1e-5)
    np.testing.assert_array_equal(scores.components["critic"], plain.rewards_S)
    np.testing.assert_array_equal(scores.components["uncertainty"], plain.stds_S)
    normalized = answer(calibrated, components=components, normalize=True)  # the scale is 2, see save_tiny_critic
    np.testing.assert_allclose(normalized.stds_S, plain.stds_S / 2, rtol=1e-5)
    np.testing.assert_allclose(normalized.rewards_S, (scores.rewards_S - 0.25) / 2, atol=1e-5)


def test_pessimism_needs_a_calibrated_critic_and_one_component(plain):
    with pytest.raises(CheckpointError, match=r"has none: run rlhf-critic calibrate"):
        answer(plain, components=with_pessimism(load_components(None), 1.0))
    with pytest.raises(ConfigError, match="already: leave out one of them"):
        with_pessimism((*load_components(None), UncertaintyComponent()), 1.0)
    assert with_pessimism(load_components(None), 0.0) == load_components(None)
