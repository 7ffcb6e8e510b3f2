"""Evaluations record only what every rollout has."""

from types import SimpleNamespace

from actors.ppo.evaluation import component_means


def test_components_that_one_version_lacks_have_no_mean():
    rollouts = [
        SimpleNamespace(components=one) for one in ({"critic": 1.0, "length": 2.0, "old": 3.0}, {"length": 4.0})
    ]
    assert component_means(rollouts) == {"reward_length": 3.0}
    assert component_means(rollouts[::-1]) == {"reward_length": 3.0}
