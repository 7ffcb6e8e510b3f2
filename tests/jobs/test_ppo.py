"""PPO as a user runs it: it learns, gives the same result when processes are killed, and stops where it should.

The policy reads and writes with a tokenizer of its own; scorers judge its texts by another. Runs share one pool, and
are compared with the first iterations of one undisturbed run: options are such that a run may be prolonged.
"""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.ppo.checkpoint import checkpoints
from actors.ppo.evaluation import Sample
from actors.ppo.trainer import PPOOutcome
from actors.serving import control
from actors.serving.handle import connect
from jobs import ppo
from jobs.cli import EXIT_REFUSED
from rlhf_critic.checkpoint.critic_directory import load_critic
from rlhf_critic.errors import ConfigError, EncodingError, ScorerFailed, ScorerUnavailable
from rlhf_critic.scoring.client import ScorerClient
from rlhf_critic.scoring.items import Conversation
from tests.actors.scorers import rewards_by_engine
from tests.helpers import WORDS, save_tiny_model, wait_until
from tests.jobs.command_line import run as run_command_line
from tests.jobs.ppo_runs import (
    BreaksAt,
    Observed,
    Switchable,
    actors_of,
    assert_nothing_is_left_running,
    assert_same_beginning,
    config_of,
    directory_of,
    history_of,
    of_length,
    weights_of,
)

REPOSITORY = Path(__file__).parents[2]
ITERATIONS, SHORT = 12, 6
pytestmark = pytest.mark.timeout(600)  # a hang guard: a run may take minutes on a busy machine


@pytest.fixture(scope="module")
def base_model(tmp_path_factory) -> str:
    """A policy whose token ids differ from those of the scorers: two letters are swapped."""
    directory = Path(save_tiny_model(tmp_path_factory.mktemp("models") / "policy", tie_word_embeddings=True))
    path = directory / "tokenizer.json"
    state = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = state["model"]["vocab"]
    vocabulary["q"], vocabulary["z"] = vocabulary["z"], vocabulary["q"]
    path.write_text(json.dumps(state), encoding="utf-8")
    return str(directory)


@pytest.fixture(scope="module")
def options(base_model, serving, critics, tmp_path_factory) -> dict:
    """PPO on a rule, the share of exclamation marks: two critic shards, two rollout workers, running scorers."""
    directory = tmp_path_factory.mktemp("ppo")
    components = directory / "components.yaml"
    components.write_text(
        "components:\n  - {kind: critic, weight: 0.0}\n"
        "  - {kind: python, name: exclaims, function: 'tests.jobs.ppo_rules:exclaims'}\n"
    )
    serving(critics["first"], components=str(components))
    prompts = directory / "prompts.jsonl"
    rng = np.random.default_rng(0)
    rows = [" ".join(rng.choice(WORDS, rng.integers(2, 6))) for _ in range(48)]
    prompts.write_text("".join(json.dumps({"instruction": row}) + "\n" for row in rows))
    optimizer = {"learning_rate": 1e-2, "token_budget": 4096, "zero_stage": 2, "warmup_fraction": 0.0}
    return {
        "policy": {"model": {"path": base_model}, "chat_template": "plain", "cpus_per_shard": 0.3}
        | {"optimizer": optimizer},
        "critic": {"shards": 2, "cpus_per_shard": 0.3, "optimizer": optimizer},
        "prompts": {
            "train": str(prompts),
            "fields": {"prompt": "instruction"},
            "validation_fraction": 0.25,
            "max_tokens": 24,
        },
        "rollout": {
            "workers": 2,
            "cpus_per_worker": 0.3,
            "prompts_per_iteration": 24,
            "samples_per_prompt": 4,
            "prompts_per_task": 6,
            "max_new_tokens": 6,
        },
        "reward": {"deadline_s": 120},
        "ppo": {
            "iterations": ITERATIONS,
            "epochs": 3,
            "minibatches": 2,
            "kl_coefficient": 0.0,
            "max_kl": 1e6,
            "entropy_coefficient": 0.0,
        },
        "run": {"name": "undisturbed", "storage_path": str(directory / "runs"), "checkpoint_every": 3},
    }


@pytest.fixture(scope="module")
def undisturbed(options) -> PPOOutcome:
    started = time.perf_counter()
    outcome = ppo.run(config_of(options, "undisturbed"))
    print(f"undisturbed run: {time.perf_counter() - started:.1f} s")
    return outcome


def test_a_policy_learns_what_a_rule_rewards(undisturbed):
    rewards = [record["reward"] for record in history_of(undisturbed.directory)]
    assert rewards[0] < 0.1
    assert rewards[-1] >= 0.9
    first, last = history_of(undisturbed.directory, "validation")
    assert first["reward"] < 0.1
    assert last["reward"] >= 0.9
    assert last["reward"] == pytest.approx(np.mean([sample.reward for sample in undisturbed.last]), abs=1e-6)
    assert [sample.prompt for sample in undisturbed.first] == [sample.prompt for sample in undisturbed.last]
    assert len(undisturbed.last) == 12
    for sample in (*undisturbed.first, *undisturbed.last):
        marks = sample.response.count("!") / max(1, len("".join(sample.response.split())))
        assert sample.reward == pytest.approx(marks, abs=1e-6)
    assert {sample.policy_version for sample in undisturbed.first} == {0}
    assert {sample.policy_version for sample in undisturbed.last} == {ITERATIONS * 6}


def test_its_history_says_what_happened(undisturbed):
    for record in history_of(undisturbed.directory):
        assert record["rollouts"] == 24 * 4
        assert record["reward_exclaims"] == pytest.approx(record["reward"], abs=1e-6)
        assert 1 <= record["response_tokens"] <= 6
        assert record["value_tokens_computed"] < record["tokens"], "rollouts of a prompt share it"
        assert record["policy_learning_rate"] == record["value_learning_rate"] == 1e-2
        assert all(np.isfinite(value) for name, value in record.items() if name != "kind")
    first, *_, last = history_of(undisturbed.directory)
    assert abs(first["kl"]) < 1e-3
    assert last["kl"] > 1
    assert (undisturbed.directory / ppo.PLOT_NAME).stat().st_size > 1000
    assert list((undisturbed.directory / "history" / "tensorboard").glob("events.*"))


def test_scorers_read_the_policys_texts_by_a_tokenizer_of_their_own(undisturbed, critics):
    items = [Conversation(sample.prompt, sample.response) for sample in undisturbed.first]
    recorded = history_of(undisturbed.directory, "validation")[0]["reward_critic"]
    assert recorded == pytest.approx(float(rewards_by_engine(critics["first"], items).mean()), abs=1e-5)


def test_checkpoints_are_kept_as_asked_and_load_in_plain_transformers(undisturbed, base_model):
    kept = [path.name for path in checkpoints(undisturbed.directory)]
    assert kept == [f"iteration-{ITERATIONS - 3:06d}", f"iteration-{ITERATIONS:06d}"]
    assert undisturbed.checkpoint.name == kept[-1]
    tokenizer = AutoTokenizer.from_pretrained(undisturbed.checkpoint / "policy")
    policy = AutoModelForCausalLM.from_pretrained(undisturbed.checkpoint / "policy")
    ids = tokenizer("please explain", add_special_tokens=False, return_tensors="pt")
    drawn = policy.generate(**ids, max_new_tokens=6, do_sample=False)[0, ids["input_ids"].shape[1] :]
    text = "".join(tokenizer.decode(drawn, skip_special_tokens=True).split())
    assert text
    assert text.count("!") / len(text) >= 0.9
    assert tokenizer.get_vocab()["q"] == AutoTokenizer.from_pretrained(base_model).get_vocab()["q"]
    critic = load_critic(undisturbed.checkpoint / "critic")
    assert critic.card.version == f"undisturbed@{ITERATIONS * 6}"
    assert critic.critic.model.score.weight.abs().max() > 0, "it began with zeros"


@pytest.mark.slow
def test_a_resumed_job_goes_on_from_its_last_checkpoint_and_changes_nothing(options, undisturbed):
    """The job ended behind a checkpoint: iterations that follow it are in the history, and are made again."""
    run = directory_of(options, "resumed")
    shutil.copytree(undisturbed.directory, run)
    shutil.rmtree(run / f"iteration-{ITERATIONS:06d}")
    outcome = ppo.run(config_of(options, run.name, resume=True))
    for record, expected in zip(history_of(run), history_of(undisturbed.directory), strict=True):
        assert record == pytest.approx(expected, abs=1e-5)
    for part in ("policy", "critic"):
        weights, expected = (weights_of(one.checkpoint / part) for one in (outcome, undisturbed))
        assert weights.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_numbers_also_while_the_critic_leaves_its_devices(options, undisturbed):
    outcome = ppo.run(
        config_of(options, "offloaded", critic={"offload": True}, ppo=of_length(2), rollout={"workers": 1})
    )
    assert_same_beginning(outcome.directory, undisturbed, 2)


@pytest.mark.slow
def test_while_values_warm_up_the_policy_stays_and_the_critic_learns_and_another_seed_gives_another_run(
    options, undisturbed, base_model
):
    """The run keeps every checkpoint."""
    outcome = ppo.run(
        config_of(
            options,
            "warm-up",
            ppo={**of_length(3), "value_warmup_iterations": 2, "seed": 1},
            run={"checkpoint_every": 1, "keep_checkpoints": 9},
        )
    )
    base = AutoModelForCausalLM.from_pretrained(base_model).state_dict()
    paths = checkpoints(outcome.directory)
    assert len(paths) == 3
    policies = [AutoModelForCausalLM.from_pretrained(path / "policy").state_dict() for path in paths]
    for name, tensor in base.items():
        for policy in policies[:2]:
            torch.testing.assert_close(policy[name][: len(tensor)], tensor, rtol=0, atol=0)
    assert any(not torch.equal(policies[2][name][: len(tensor)], tensor) for name, tensor in base.items())
    heads = [weights_of(path / "critic")["score.weight"] for path in paths]
    assert heads[0].abs().max() > 0
    assert not torch.equal(heads[0], heads[1])
    records = history_of(outcome.directory)
    assert ["policy_loss" in record for record in records] == [False, False, True]
    assert [abs(record["kl"]) < 1e-3 for record in records] == [True, True, True]
    for record, other in zip(records, history_of(undisturbed.directory), strict=False):
        assert record["tokens"] != other["tokens"] or record["reward_critic"] != other["reward_critic"]


@pytest.mark.slow
def test_value_pretraining_critic_epochs_and_turns_of_a_tool_resume_with_the_same_numbers(options, tmp_path):
    """Every option at once: Monte Carlo returns at first, two critic epochs, and turns with answers between."""
    changes = {
        "ppo": {
            **of_length(4),
            "epochs": 1,
            "critic_epochs": 2,
            "value_warmup_iterations": 2,
            "value_warmup_lambda": 1.0,
            "critic_lambda": 0.9,
            "gae_step": "turn",
            "clip_high": 0.3,
            "dual_clip": 3.0,
            "loss_mean": "sequence",
        },
        "rollout": {"environment": "tests.jobs.ppo_rules:echoes", "max_turns": 2, "max_new_tokens": 24},
        "run": {"checkpoint_every": 1, "keep_checkpoints": 9},
    }
    whole = ppo.run(config_of(options, "turns", **changes))
    records = history_of(whole.directory)
    assert ["policy_loss" in record for record in records] == [False, False, True, True]
    assert all(np.isfinite(record["value_calibration_error"]) for record in records)
    updates = [load_critic(path / "critic").card.training["step"] for path in checkpoints(whole.directory)]
    assert updates == [4, 8, 12, 16], "two passes of two minibatches"
    samples = (whole.directory / "history" / "samples" / "iteration-000004.jsonl").read_text()
    assert "yes" in samples
    run = directory_of(options, "turns-resumed")
    shutil.copytree(whole.directory, run)
    for iteration in (2, 3, 4):  # it ended while values warmed up
        shutil.rmtree(run / f"iteration-{iteration:06d}")
    again = ppo.run(config_of(options, run.name, resume=True, **changes))
    for record, expected in zip(history_of(run), records, strict=True):
        assert record == pytest.approx(expected, abs=1e-5)
    for part in ("policy", "critic"):
        weights = weights_of(again.checkpoint / part)
        for name, tensor in weights_of(whole.checkpoint / part).items():
            torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_a_critic_shard_that_is_killed_changes_nothing(options, undisturbed, caplog):
    """The job resumes alone: from its start while there is no checkpoint, and then from the last one."""
    run = directory_of(options, "shard-killed")
    finished: list[PPOOutcome] = []
    job = threading.Thread(target=lambda: finished.append(ppo.run(config_of(options, run.name, ppo=of_length(SHORT)))))
    resumed = "rank lost, resuming from the last checkpoint"
    job.start()
    for number, iterations in enumerate((1, 4), 1):
        wait_until(lambda at_least=iterations: len(history_of(run)) >= at_least, f"iteration {iterations}", 240)
        actors_of("CriticRank")[-1].send_signal(signal.SIGKILL)
        wait_until(lambda times=number: caplog.text.count(resumed) == times, "the job to notice")
    job.join(400)
    assert finished, "the job did not survive a killed shard"
    assert len(re.findall(r"critic rank \d (?:was lost during a call|failed) to ", caplog.text)) == 2
    assert f"{resumed} failures=2/3" in caplog.text
    assert_same_beginning(run, undisturbed, SHORT)
    for name, tensor in weights_of(checkpoints(run)[-1] / "policy").items():
        assert torch.isfinite(tensor).all(), name


@pytest.mark.slow
def test_a_job_that_is_killed_resumes_and_changes_nothing(options, undisturbed, ray_address, tmp_path, request):
    run = directory_of(options, "killed [3], à l'essai")  # DeepSpeed takes brackets for a pattern
    config = tmp_path / "config.yaml"
    config.write_text(config_of(options, run.name, ppo=of_length(SHORT)).model_dump_json())  # JSON is YAML
    said = tmp_path / "said.txt"
    with said.open("w") as output:
        job = psutil.Popen(
            [sys.executable, "-m", "jobs.ppo", "--config", str(config)],
            cwd=REPOSITORY,
            env={**os.environ, "RAY_ADDRESS": ray_address},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    request.addfinalizer(lambda: job.poll() is None and job.kill())
    wait_until(lambda: len(history_of(run)) >= 4 or job.poll() is not None, "four iterations", 500)
    assert job.poll() is None, said.read_text()[-4000:]
    os.killpg(job.pid, signal.SIGKILL)
    job.wait(30)
    assert_nothing_is_left_running()
    assert len(checkpoints(run)) == 1
    # The state after a job died while it wrote a checkpoint.
    (run / ".iteration-000006-half" / "policy").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"continue it with --resume, or choose another --run\.name"):
        ppo.run(config_of(options, run.name, ppo=of_length(SHORT)))
    ppo.run(config_of(options, run.name, resume=True, ppo=of_length(SHORT)))
    assert_same_beginning(run, undisturbed, SHORT)
    changed = {**of_length(SHORT), "epochs": 1, "gamma": 0.5}
    with pytest.raises(ConfigError, match=r"other options: ppo.epochs: 3 -> 1; ppo.gamma: 1.0 -> 0.5. Restore them"):
        ppo.run(config_of(options, run.name, resume=True, ppo=changed))
    with pytest.raises(ConfigError, match="its prompts, their template or length limit are not those it began with"):
        ppo.run(config_of(options, run.name, resume=True, ppo=of_length(SHORT), prompts={"validation_fraction": 0.5}))
    sibling = {**options["policy"], "model": {"path": str(run / "iteration-000006" / "policy")}}
    with pytest.raises(ConfigError, match=r"the base model .* is not the one it began with"):
        ppo.run(config_of(options, run.name, resume=True, ppo=of_length(SHORT), policy=sibling))


@pytest.mark.slow
@pytest.mark.parametrize("allow_mixed_versions", [False, True])
def test_a_reward_model_published_while_the_job_goes_on_judges_from_then_on(options, critics, allow_mixed_versions):
    """An iteration has one version, unless versions may be mixed: then no reward is requested again."""
    control.publish("scorers", critics["first"], 120, lambda _: None)
    mixing = {"allow_mixed_versions": allow_mixed_versions}
    config = config_of(options, f"live-{allow_mixed_versions}", ppo=of_length(4), reward=mixing)
    prompts, held_out = ppo.read_prompts(config)

    def publish() -> None:
        control.publish("scorers", critics["second"], 120, lambda _: None)

    with connect(deadline_s=120) as client, Observed(publish, config, prompts, held_out, client) as run:
        run.run()
    old, new = {"tiny@1"}, {"tiny@2"}
    assert run.versions == [old, old, old, old | new if allow_mixed_versions else new, new, new]


@pytest.mark.slow
def test_scorers_that_fail_cost_no_iteration(options, undisturbed, tmp_path):
    """No checkpoint is due before the end. The critic is away from its devices while rollouts are made."""
    broken = tmp_path / "broken"
    changes = {"ppo": of_length(2), "run": {"checkpoint_every": 0}, "critic": {"offload": True}}
    run = directory_of(options, "broken")
    for resume, at, saved in ((False, (1, False), 1), (True, (2, True), 2)):
        config = config_of(options, run.name, resume=resume, **changes)
        prompts, held_out = ppo.read_prompts(config)
        with (
            ScorerClient(Switchable(broken), deadline_s=120) as client,
            BreaksAt(broken, *at, config, prompts, held_out, client) as attempt,
            pytest.raises(ScorerFailed, match="a component is broken"),
        ):
            attempt.run()
        broken.unlink()
        assert [path.name for path in checkpoints(run)][-1] == f"iteration-{saved:06d}"
        assert_nothing_is_left_running()
    ppo.run(config_of(options, run.name, resume=True, **changes))
    assert_same_beginning(run, undisturbed, 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("runaway", {"max_kl": 1e-3}, r"iteration 2: the mean KL .* nats, above ppo.max_kl 0.001: the policy left"),
        (
            "nan",
            {"epochs": 1, "minibatches": 1},
            "the policy's output is NaN or infinite, so no token can be sampled",
        ),
    ],
)
def test_a_policy_that_runs_away_ends_the_job_with_advice_and_keeps_the_checkpoints(
    options, tmp_path, monkeypatch, capsys, name, changes, message
):
    """The step that went too far may be finite, so that only the next responses show it."""
    optimizer = {**options["policy"]["optimizer"], **({"learning_rate": 1e39} if name == "nan" else {})}
    run = directory_of(options, name)
    control.wait_until_served("scorers", 60, lambda _: None)
    config = tmp_path / "config.yaml"
    config.write_text(
        config_of(
            options,
            run.name,
            policy={"optimizer": optimizer},
            ppo={**of_length(SHORT), **changes},
            run={"checkpoint_every": 1},
        ).model_dump_json()
    )
    code, _, said = run_command_line(ppo.main, ["--config", str(config)], monkeypatch, capsys)
    assert code == EXIT_REFUSED
    assert re.search(message, said)
    assert re.search("lower --policy.optimizer.learning-rate", said, re.IGNORECASE)
    assert [path.name for path in checkpoints(run)] == ["iteration-000001"]
    load_critic(run / "iteration-000001" / "critic")
    AutoModelForCausalLM.from_pretrained(run / "iteration-000001" / "policy")
    assert_nothing_is_left_running()


def test_a_critic_of_another_tokenizer_is_refused_before_anything_starts(options, critics):
    config = config_of(options, "tokenizers", critic={"model": {"path": critics["first"]}})
    with pytest.raises(
        EncodingError, match=r"the policy's tokenizer is not the critic's: 4 entries differ, such as '[qz]'"
    ):
        ppo.run(config)
    assert not directory_of(options, "tokenizers").exists()
    assert not actors_of("PolicyRank")


def test_a_pool_in_the_way_is_refused_and_goes_on(options, critics):
    with pytest.raises(ConfigError, match=r"a pool 'scorers' runs already: leave out reward\.checkpoint to use it"):
        ppo.run(config_of(options, "in-the-way", reward={"checkpoint": critics["second"]}))
    assert control.is_running("scorers")
    assert not directory_of(options, "in-the-way").exists()


def test_responses_that_look_like_markup_are_shown_as_they_are(tmp_path):
    def samples(*rewards: float) -> list[Sample]:
        said = r"\[x] [/b] \\[/red] [bold]"
        return [Sample([{"role": "user", "content": said}], said, reward, "m", 0) for reward in rewards]

    console = Console(width=200, record=True)
    ppo.show(console, PPOOutcome(tmp_path, tmp_path, samples(1.0, 3.0), samples(4.0, 4.0)))
    shown = console.export_text()
    assert shown.count(r"\[x] [/b] \\[/red] [bold]") == 3 * 2
    assert "+2.000 before (standard deviation 1.000), +4.000 after: a rise of 2.00 standard deviations" in shown
    ppo.show(console, PPOOutcome(tmp_path, tmp_path, samples(1.0, 1.0), samples(4.0, 4.0)))
    assert "standard deviation 0.000), +4.000 after\n" in console.export_text(), "nothing is divided by 0"
    ppo.show(console, PPOOutcome(tmp_path, tmp_path, samples(1.0), samples(4.0, 4.0)))
    assert "before" not in console.export_text()
    judged_by_another = [dataclasses.replace(sample, model_version="n") for sample in samples(4.0, 4.0)]
    ppo.show(console, PPOOutcome(tmp_path, tmp_path, samples(1.0, 3.0), judged_by_another))
    shown = console.export_text()
    assert "the scales differ: m scored before, n after" in shown
    assert "a rise of" not in shown


@pytest.mark.slow
def test_scorers_that_stop_answering_end_the_job_after_the_deadline(options):
    """The last test of this module: it ends the pool."""
    impatient = {"deadline_s": 4, "patience_s": 0}
    config = config_of(options, "no-scorers", ppo=of_length(500), reward=impatient, run={"checkpoint_every": 0})
    run = directory_of(options, "no-scorers")
    failures: list[BaseException] = []

    def job() -> None:
        try:
            ppo.run(config)
        except BaseException as error:
            failures.append(error)

    running = threading.Thread(target=job)
    running.start()
    wait_until(lambda: len(history_of(run)) >= 3 or failures, "three iterations", 500)
    assert not failures
    control.stop("scorers")
    running.join(90)
    assert isinstance(failures[0], ScorerUnavailable), failures
    assert "within 4 s" in str(failures[0])
    assert_nothing_is_left_running()
    last = max(record["step"] for record in history_of(run))
    assert [path.name for path in checkpoints(run)] == [f"iteration-{last:06d}"]
