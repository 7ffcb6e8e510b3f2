"""A PPO run of an earlier version resumes, although its options lack those that were added since."""

import json
from types import SimpleNamespace

import pytest

from actors.ppo.checkpoint import PPO_STATE_NAME, RunState, read_state
from rlhf_critic.algorithms.ppo import RunningMoments
from rlhf_critic.config.ppo import PPOJobConfig
from rlhf_critic.errors import ConfigError

ADDED = (
    *("critic_epochs", "critic_lambda", "length_adaptive_alpha", "gae_step", "baseline", "clip_high", "dual_clip"),
    *("loss_mean", "value_warmup_lambda"),
)
PROMPTS = SimpleNamespace(fingerprint="same")


def config_of(**ppo: object) -> PPOJobConfig:
    warmup = {"value_warmup_iterations": 2, "gae_lambda": 0.9}
    return PPOJobConfig.model_validate({"policy": {"model": {"path": "hub/model"}}, "ppo": {**warmup, **ppo}})


@pytest.fixture
def earlier(tmp_path):
    """A checkpoint whose options are those of an earlier version."""
    state = RunState(
        iteration=3,
        moments=RunningMoments(),
        options=config_of().model_dump(mode="json"),
        prompts="same",
        reference="hub/model",
    )
    written = json.loads(state.model_dump_json())
    for name in ADDED:
        del written["options"]["ppo"][name]
    (tmp_path / PPO_STATE_NAME).write_text(json.dumps(written))
    return tmp_path


def test_a_run_of_an_earlier_version_resumes(earlier):
    assert read_state(earlier, config_of(), PROMPTS).iteration == 3


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"critic_epochs": 2}, "ppo.critic_epochs: 1 -> 2"),
        ({"critic_lambda": 1.0}, "ppo.critic_lambda: None -> 1.0"),
        ({"loss_mean": "sequence"}, "ppo.loss_mean: token -> sequence"),
    ],
)
def test_it_does_not_resume_with_what_is_new(earlier, changed, message):
    with pytest.raises(ConfigError, match=message):
        read_state(earlier, config_of(**changed), PROMPTS)
