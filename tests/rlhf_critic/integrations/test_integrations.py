"""Other trainers receive the critic's rewards, and its errors as errors."""

import asyncio
import importlib.util
import itertools
import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from actors.serving.handle import connect
from rlhf_critic.checkpoint.critic_directory import load_critic
from rlhf_critic.errors import ConfigError, DataError, ScorerRejected, ScorerUnavailable
from rlhf_critic.integrations import openrlhf, verl
from rlhf_critic.integrations.client_from_environment import client_from_environment
from rlhf_critic.integrations.trl import reward_function
from rlhf_critic.scoring.http_client import connect_http
from rlhf_critic.scoring.items import Conversation
from tests.actors.scorers import make_conversations, rewards_by_engine

pytestmark = pytest.mark.timeout(300)
TOLERANCE = 1e-5
THREADS = 32


@pytest.mark.parametrize("shape", ["standard", "conversational"])
def test_grpo_takes_its_steps_with_rewards_from_scorers(serving, critics, tiny_model, tmp_path, shape):
    serving(critics["first"], max_replicas=1)
    prompts = [item.prompt for item in make_conversations(8)]
    if shape == "conversational":
        prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
    with connect() as client:
        trainer = GRPOTrainer(
            model=tiny_model,
            processing_class=AutoTokenizer.from_pretrained(tiny_model, pad_token="</s>"),
            reward_funcs=reward_function(client, name="politeness"),
            train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
            args=GRPOConfig(
                output_dir=str(tmp_path),
                max_steps=2,
                per_device_train_batch_size=4,
                num_generations=2,
                max_completion_length=8,
                logging_steps=1,
                log_completions=True,
                report_to="none",
                save_strategy="no",
                use_cpu=True,
            ),
        )
        before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
        trainer.train()
    # TRL logs the prompts, completions and rewards of each step.
    steps = [pq.read_table(file).to_pylist() for file in sorted((tmp_path / "completions").glob("*.parquet"))]
    assert [len(rows) for rows in steps] == [4, 4]
    for row in itertools.chain(*steps):
        text = row["completion"] if shape == "standard" else row["completion"][-1]["content"]
        (wanted,) = rewards_by_engine(critics["first"], [Conversation(row["prompt"], text)])
        assert row["politeness"] == pytest.approx(wanted, abs=TOLERANCE)
    changed = [name for name, weight in trainer.model.named_parameters() if not torch.equal(weight, before[name])]
    assert changed, "the policy learned from the rewards"


USER = {"role": "user", "content": "a"}
ANSWER = {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("prompt", "completion", "reason"),
    [
        ([USER], [], "does not end with an assistant's turn"),
        ([USER], [ANSWER, {"role": "tool", "content": "b"}], "does not end with an assistant's turn"),
        ("a", [ANSWER], "consists of turns, but its prompt is a text"),
        ([USER], [{"role": "assistant", "content": None}], "ends with a turn that is not text"),
        ([USER], [{"role": "assistant", "content": [{"type": "image"}]}], "ends with a turn that is not text"),
        ([USER], [{**ANSWER, "tool_calls": ["function"]}], "ends with a turn that is not text"),
    ],
)
def test_a_completion_that_is_no_text_is_refused(prompt, completion, reason):
    with connect_http("http://127.0.0.1:9", deadline_s=0.5) as nobody, pytest.raises(ScorerRejected) as refused:
        reward_function(nobody)([[USER], prompt], [[ANSWER], completion], completion_ids=[[1], [2]])
    assert (refused.value.kind, refused.value.item) == ("not_text", 1)
    assert f"completion 1 {reason}" in str(refused.value)
    assert "return None for them" in str(refused.value), "it says what to do"


def test_a_failure_is_an_error_and_no_missing_reward():
    nobody = connect_http("http://127.0.0.1:9", deadline_s=0.5)
    with nobody, pytest.raises(ScorerUnavailable, match=r"within 0\.5 s"):
        reward_function(nobody)(["a"], ["b"])


def test_turns_as_a_table_has_them_and_a_trip_to_another_process(serving, critics):
    """Tables add absent fields as None to turns, and TRL's asynchronous trainers pickle reward functions."""
    url = serving(critics["first"], max_replicas=1)
    table = Dataset.from_list([{"prompt": [{**USER, "name": "x"}]}, {"prompt": [USER]}])
    called = [{"role": "assistant", "content": "wait", "tool_calls": None}, {"role": "tool", "content": "7"}]
    with connect_http(url) as client:
        score = pickle.loads(pickle.dumps(reward_function(client, name="politeness")))
    assert score.__name__ == "politeness"
    rewards = score(prompts=[table[1]["prompt"]] * 2, completions=[[ANSWER], [*called, ANSWER]])
    plain = [{"role": turn["role"], "content": turn["content"]} for turn in called]
    items = [Conversation([USER], "b"), Conversation([USER, *plain], "b")]
    np.testing.assert_allclose(rewards, rewards_by_engine(critics["first"], items), atol=TOLERANCE)


def load_as_trainers_do(module):
    """Loads a reward file by its path, as verl and OpenRLHF do."""
    spec = importlib.util.spec_from_file_location("custom_module", module.__file__)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


async def in_threads(calls):
    """Calls a function in a thread, as verl's reward workers and OpenRLHF's engines do."""
    return await asyncio.gather(*(asyncio.to_thread(call) for call in calls))


def test_verl_calls(serving, critics, monkeypatch):
    monkeypatch.setenv("RLHF_CRITIC_URL", serving(critics["first"], max_replicas=1))
    items = make_conversations(5)
    wanted = rewards_by_engine(critics["first"], items)
    module = load_as_trainers_do(verl)
    turns = [[{"role": "user", "content": item.prompt, "name": None}] for item in items]
    # The naive manager of 0.9.1 passes one response per call and adds entries to those of the data.
    added = {"index": 3, "num_turns": 2, "rollout_reward_scores": {}}
    calls = [
        partial(
            module.compute_score,
            data_source="hh",
            solution_str=item.response,
            ground_truth=None,
            extra_info={"prompt": prompt, **added},
        )
        for item, prompt in zip(items, [items[0].prompt, *turns[1:]], strict=True)
    ]
    np.testing.assert_allclose(asyncio.run(in_threads(calls)), wanted, atol=TOLERANCE)
    # The batch manager of 0.7.0 passes numpy arrays as rows.
    batch = module.compute_scores(
        data_sources=np.array(["hh"] * 5, dtype=object),
        solution_strs=[item.response for item in items],
        ground_truths=[None] * 5,
        extra_infos=np.array([{"prompt": np.array(prompt)} for prompt in turns], dtype=object),
    )
    np.testing.assert_allclose(batch, wanted, atol=TOLERANCE)
    assert all(type(reward) is float for reward in batch)


@pytest.mark.parametrize("extra_info", [None, {}, {"index": 1}, {"prompt": None}])
def test_verl_rows_without_a_prompt(extra_info):
    with pytest.raises(DataError, match=r"hh: field 'extra_info\.prompt' is missing.* store each row's prompt there"):
        verl.compute_score("hh", "a", None, extra_info)


@pytest.mark.parametrize("prompt", [7, ["a"], {"role": "user", "content": "a"}])
def test_verl_prompts_that_are_none(prompt):
    with pytest.raises(DataError, match=r"hh: field 'extra_info\.prompt' must be a text, or a list of turns"):
        verl.compute_score("hh", "a", None, {"prompt": prompt})


def test_openrlhf_calls(serving, critics, monkeypatch, tmp_path):
    file = tmp_path / "token"
    url = serving(critics["first"], max_replicas=1, auth="on", token_file=str(file))
    monkeypatch.setenv("RLHF_CRITIC_URL", url)
    monkeypatch.setenv("RLHF_CRITIC_TOKEN_FILE", str(file))
    items = make_conversations(5)
    encoder = load_critic(critics["first"]).encoder
    queries = [encoder.render(*item) for item in items]
    prompts = [query[: -len(item.response + encoder.ending)] for query, item in zip(queries, items, strict=True)]
    # Raw outputs of a policy: one truncated before its EOS, one padded with EOS.
    queries[0] = queries[0].removesuffix(encoder.ending)
    queries[1] += "</s></s>"
    reward_func = load_as_trainers_do(openrlhf).reward_func
    calls = [partial(reward_func, [query], [prompt], [""]) for query, prompt in zip(queries, prompts, strict=True)]
    answers = asyncio.run(in_threads(calls))
    wanted = rewards_by_engine(critics["first"], items)
    for name in ("rewards", "scores"):
        read = [torch.tensor([answer[name]]) for answer in answers]  # as OpenRLHF does
        np.testing.assert_allclose(torch.cat(read).numpy(), wanted, atol=TOLERANCE)
    assert [answer["extra_logs"] for answer in answers] == [{}] * 5
    together = reward_func(queries, prompts, [""] * 5)
    np.testing.assert_allclose(together["rewards"].numpy(), wanted, atol=TOLERANCE)
    monkeypatch.delenv("RLHF_CRITIC_TOKEN_FILE")
    with pytest.raises(ScorerRejected, match="the bearer token is missing or wrong"):
        reward_func(queries, prompts, [""] * 5)


def test_a_process_has_one_client(monkeypatch, tmp_path):
    file = tmp_path / "token"
    file.write_text("secret")  # reading the file lets other threads run
    monkeypatch.setenv("RLHF_CRITIC_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("RLHF_CRITIC_TOKEN_FILE", str(file))
    together = threading.Barrier(THREADS)

    def connect_together():
        together.wait(timeout=60)
        return client_from_environment()

    with ThreadPoolExecutor(THREADS) as threads:
        here, *others = [call.result() for call in [threads.submit(connect_together) for _ in range(THREADS)]]
    assert all(other is here for other in others)
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:  # the child has only this thread and must not run further tests
        os.write(writer, b"own" if client_from_environment() is not here else b"parent's")
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 16) == b"own"


def test_a_pool_that_nobody_named(monkeypatch):
    monkeypatch.delenv("RLHF_CRITIC_URL", raising=False)
    with pytest.raises(ConfigError, match="set RLHF_CRITIC_URL to the pool's address"):
        verl.compute_score("hh", "a", None, {"prompt": "b"})
    monkeypatch.setenv("RLHF_CRITIC_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("RLHF_CRITIC_TOKEN_FILE", "/nowhere/token")
    with pytest.raises(ConfigError, match="/nowhere/token cannot be read"):
        verl.compute_score("hh", "a", None, {"prompt": "b"})
