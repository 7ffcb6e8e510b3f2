"""Bad input ends a PPO job with its exit code, a message that names the fault and the option, and nothing started."""

import json
from pathlib import Path

import pytest
import ray

from actors.ppo.checkpoint import free_options
from jobs import ppo
from jobs.cli import EXIT_REFUSED
from rlhf_critic.config.base import changed_options
from rlhf_critic.config.ppo import PPOJobConfig
from rlhf_critic.errors import ConfigError
from tests.jobs.command_line import run

ROW = json.dumps({"prompt": "please explain"})


def refusal(arguments, monkeypatch, capsys) -> str:
    """Returns the message of a rejected command in one line."""
    code, _, message = run(ppo.main, arguments, monkeypatch, capsys)
    assert code == EXIT_REFUSED
    assert "Traceback" not in message
    return " ".join(message.replace("│", " ").split())


OPTIONS = {
    "no policy": (["--prompts.train", "x.jsonl"], "policy.model.path is required: give --policy.model.path VALUE"),
    "no prompts": (["--policy.model.path", "x"], "prompts.train is required: give --prompts.train VALUE"),
    "an unknown option": (["--ppo.epoch", "2"], "epoch"),
    "a number out of range": (["--ppo.clip", "1"], "clip Input should be less than 1"),
    "no iterations": (["--ppo.iterations", "0"], "greater than 0"),
    "an unknown estimator": (["--ppo.kl-estimator", "k4"], "k4"),
    "more minibatches than prompts": (
        ["--rollout.prompts-per-iteration", "4", "--ppo.minibatches", "5"],
        "ppo.minibatches exceeds rollout.prompts_per_iteration",
    ),
    "two ways to hold out": (
        ["--prompts.validation", "v.jsonl", "--prompts.validation-fraction", "0.1"],
        "exclude each other; give one of them",
    ),
    "components of a pool that is not the job's": (["--reward.components", "c.yaml"], "reward.checkpoint"),
    "fewer replicas at most than at least": (
        ["--reward.checkpoint", "critic", "--reward.min-replicas", "2"],
        "reward.max_replicas 1 is below reward.min_replicas 2",
    ),
    "a penalty on unscored responses": (
        ["--ppo.bootstrap-truncated", "--reward.missing-eos-penalty", "1"],
        "reward.missing_eos_penalty and ppo.bootstrap_truncated exclude each other",
    ),
    "a group of one": (["--ppo.baseline", "rloo"], "ppo.baseline rloo needs rollout.samples_per_prompt of at least 2"),
    "a bootstrap without a critic": (
        ["--ppo.baseline", "grpo", "--rollout.samples-per-prompt", "2", "--ppo.bootstrap-truncated"],
        "ppo.baseline grpo and ppo.bootstrap_truncated exclude each other",
    ),
    "a lambda of no warm-up": (["--ppo.value-warmup-lambda", "1"], "needs ppo.value_warmup_iterations"),
    "a dual clip that limits nothing": (["--ppo.dual-clip", "1"], "dual_clip Input should be greater than 1"),
    "nothing but warm-up": (
        ["--ppo.iterations", "3", "--ppo.value-warmup-iterations", "3"],
        "ppo.value_warmup_iterations must be less than ppo.iterations",
    ),
    "storage that is a URI": (["--run.storage-path", "s3://bucket/runs"], "must be a path, because shards write"),
    "a name that is a path": (["--run.name", "a/b"], "must be a single directory name"),
    "a config file that is not there": (["--config", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
    "an unknown key in a config file": (["--config", "typo.yaml"], "rollout.worker"),
}


@pytest.mark.parametrize("what", OPTIONS)
def test_bad_options(what, tmp_path, monkeypatch, capsys):
    arguments, expected = OPTIONS[what]
    monkeypatch.chdir(tmp_path)
    if "unknown key" in what:
        Path("typo.yaml").write_text("rollout: {worker: 2}\n")
    before = sorted(tmp_path.iterdir())
    assert expected in refusal(arguments, monkeypatch, capsys)
    assert sorted(tmp_path.iterdir()) == before


DATA = {
    "a missing file": (None, "prompts.jsonl: cannot be read"),
    "an empty file": ("", "prompts.jsonl: has no rows"),
    "not JSON": ('{"prompt": "a"', "prompts.jsonl:2: not JSON"),
    "no such field": ('{"text": "a"}', "prompts.jsonl:2: field 'prompt': must be a text, or a list of turns"),
    "an empty text under a plain template": ('{"prompt": ""}', "prompts.jsonl:2: field 'prompt': has no token"),
    "nothing to hold out": (ROW, "of 1 different prompts leaves nothing to train on or nothing to hold out"),
}


@pytest.mark.parametrize("what", DATA)
def test_bad_prompts(what, tiny_model, tmp_path, monkeypatch, capsys):
    line, expected = DATA[what]
    monkeypatch.chdir(tmp_path)
    if line is not None:
        Path("prompts.jsonl").write_text(f"{ROW}\n{line}\n" if line else "")
    arguments = ["--policy.model.path", tiny_model, "--policy.chat-template", "plain", "--prompts.train"]
    arguments += ["prompts.jsonl", "--prompts.validation-fraction", "0.5"]
    assert expected in refusal(arguments, monkeypatch, capsys)
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def arguments(tiny_model, tmp_path, monkeypatch) -> list[str]:
    """Arguments that pass all checks before the job looks for scorers."""
    monkeypatch.chdir(tmp_path)
    Path("prompts.jsonl").write_text(f"{ROW}\n" * 4)
    return ["--policy.model.path", tiny_model, "--prompts.train", "prompts.jsonl", "--rollout.max-new-tokens", "8"]


def test_a_name_that_is_in_use_is_refused(arguments, monkeypatch, capsys):
    Path("runs/mine/iteration-000001").mkdir(parents=True)
    said = refusal([*arguments, "--run.name", "mine"], monkeypatch, capsys)
    assert "there is a run named 'mine'" in said
    assert "continue it with --resume, or choose another --run.name" in said


def test_lengths_beyond_the_critics_are_refused(arguments, critics, monkeypatch, capsys):
    longer = [*arguments, "--critic.model.path", critics["first"], "--prompts.max-tokens", "57"]
    said = refusal(longer, monkeypatch, capsys)
    assert "make up to 65 tokens, but the critic" in said
    assert "reads 64: lower them, or train a critic with a longer encoding.max_length" in said


def test_a_policy_without_a_tokenizer_is_refused(arguments, monkeypatch, capsys):
    assert "no tokenizer could be loaded from 'nowhere'" in refusal(
        [*arguments, "--policy.model.path", "nowhere"], monkeypatch, capsys
    )


def test_a_checkpoint_whose_state_is_damaged_is_refused(arguments, monkeypatch, capsys):
    checkpoint = Path("runs/mine/iteration-000003")
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text('{"iteration": 3')
    said = refusal([*arguments, "--run.name", "mine", "--resume"], monkeypatch, capsys)
    assert "iteration-000003: incomplete, 0 of 1 manifests found" in said
    assert checkpoint.is_dir()


def test_no_pool_of_scorers_is_refused(arguments, ray_address, monkeypatch, capsys):
    said = refusal([*arguments, "--reward.app", "absent"], monkeypatch, capsys)
    assert "there is no pool of scorers 'absent': give --reward.checkpoint CRITIC" in said
    assert "rlhf-critic serve CRITIC" in said
    assert not any(path.is_dir() for path in Path("runs").iterdir())


def test_a_machine_without_room_says_so_at_once(ray_address):
    there = ray.cluster_resources()["CPU"]
    roomy = PPOJobConfig.model_validate({"rollout": {"workers": 1, "cpus_per_worker": there - 2}})
    ppo.validate_room(roomy)
    own_pool = {"reward": {"checkpoint": "critic"}, "rollout": {"workers": 1, "cpus_per_worker": there - 2}}
    with pytest.raises(
        ConfigError, match=rf"reserve {there + 1:g} CPUs, this machine has {there:g}.*--critic.cpus-per"
    ):
        ppo.validate_room(PPOJobConfig.model_validate(own_pool))


@pytest.mark.parametrize(
    ("schedule", "warmup", "refused"), [("constant", 0.0, False), ("constant", 0.05, True), ("cosine", 0.0, True)]
)
def test_a_run_may_be_prolonged_only_where_no_schedule_depends_on_its_length(schedule, warmup, refused):
    optimizer = {"optimizer": {"schedule": schedule, "warmup_fraction": warmup}}
    before, after = (
        PPOJobConfig.model_validate({"policy": optimizer, "critic": optimizer, "ppo": {"iterations": iterations}})
        for iterations in (10, 20)
    )
    assert changed_options(before, after, free_options(before, after)) == (
        ["ppo.iterations: 10 -> 20"] if refused else []
    )


def test_options_of_where_and_how_fast_may_change():
    before = PPOJobConfig.model_validate({"rollout": {"workers": 1}})
    moved = {"rollout": {"workers": 3, "timeout_s": 9}, "run": {"storage_path": "/elsewhere"}, "resume": True}
    moved |= {"critic": {"offload": True, "optimizer": {"token_budget": 99}}, "reward": {"app": "other"}}
    after = PPOJobConfig.model_validate(moved)
    assert not changed_options(before, after, free_options(before, after))
    seeded = PPOJobConfig.model_validate({"ppo": {"seed": 3}, "critic": {"shards": 2}})
    assert changed_options(before, seeded, free_options(before, seeded)) == [
        "critic.shards: 1 -> 2",
        "ppo.seed: 0 -> 3",
    ]
