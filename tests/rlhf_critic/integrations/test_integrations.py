"""Other trainers get the critic's rewards, and its errors as errors."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from actors.scorer_handle import connect
from rlhf_critic.checkpoint import load_critic
from rlhf_critic.errors import ConfigError, DataError, ScorerRejected, ScorerUnavailable
from rlhf_critic.http_transport import connect_http
from rlhf_critic.integrations import openrlhf, verl
from rlhf_critic.integrations.trl import reward_function
from rlhf_critic.scoring import Conversation
from tests.actors.scorers import make_conversations, rewards_by_engine

pytestmark = pytest.mark.timeout(300)
TOLERANCE = 1e-5


@pytest.mark.parametrize("shape", ["standard", "conversational"])
def test_grpo_takes_its_steps_with_rewards_from_scorers(serving, critics, tiny_model, tmp_path, shape):
    serving(critics["first"], max_replicas=1)
    prompts = [item.prompt for item in make_conversations(8)]
    if shape == "conversational":
        prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
    seen = []
    with connect() as client:
        score = reward_function(client)

        def recorded(prompts, completions, **others):
            rewards = score(prompts, completions, **others)
            seen.append((prompts, completions, rewards))
            return rewards

        recorded.__name__ = score.__name__
        trainer = GRPOTrainer(
            model=tiny_model,
            processing_class=AutoTokenizer.from_pretrained(tiny_model, pad_token="</s>"),
            reward_funcs=recorded,
            train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
            args=GRPOConfig(
                output_dir=str(tmp_path),
                max_steps=2,
                per_device_train_batch_size=4,
                num_generations=2,
                max_completion_length=8,
                logging_steps=1,
                report_to="none",
                save_strategy="no",
                use_cpu=True,
            ),
        )
        before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
        trainer.train()
    assert len(seen) == 2
    logged = [entry["rewards/critic/mean"] for entry in trainer.state.log_history if "rewards/critic/mean" in entry]
    for (asked, completions, rewards), mean in zip(seen, logged, strict=True):
        texts = [completion if shape == "standard" else completion[-1]["content"] for completion in completions]
        wanted = rewards_by_engine(critics["first"], [Conversation(*pair) for pair in zip(asked, texts, strict=True)])
        np.testing.assert_allclose(rewards, wanted, atol=TOLERANCE)
        assert mean == pytest.approx(wanted.mean(), abs=1e-4)
    changed = [name for name, weight in trainer.model.named_parameters() if not torch.equal(weight, before[name])]
    assert changed, "the policy learned from the rewards"


def test_a_completion_that_is_no_text_is_refused(serving, critics):
    url = serving(critics["first"], max_replicas=1)
    with connect_http(url) as client:
        score = reward_function(client)
        with pytest.raises(ScorerRejected, match="must end with an assistant's turn"):
            score([[{"role": "user", "content": "a"}]], [[{"role": "tool", "content": "b"}]])
        with pytest.raises(ScorerRejected, match="needs a conversational prompt"):
            score(["a"], [[{"role": "assistant", "content": "b"}]])
    nobody = connect_http("http://127.0.0.1:9", deadline_s=0.5)
    with nobody, pytest.raises(ScorerUnavailable, match=r"within 0\.5 s"):
        reward_function(nobody)(["a"], ["b"])


def load_as_trainers_do(module):
    """verl and OpenRLHF load a file by its path."""
    spec = importlib.util.spec_from_file_location("custom_module", module.__file__)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def test_verl_calls(serving, critics, monkeypatch):
    monkeypatch.setenv("RLHF_CRITIC_URL", serving(critics["first"], max_replicas=1))
    items = make_conversations(5)
    wanted = rewards_by_engine(critics["first"], items)
    module = load_as_trainers_do(verl)
    infos = [{"prompt": np.array([{"role": "user", "content": item.prompt}]), "index": 3} for item in items]
    responses = [item.response for item in items]
    batch = module.compute_scores(
        data_sources=["hh"] * 5, solution_strs=responses, ground_truths=[None] * 5, extra_infos=infos
    )
    np.testing.assert_allclose(batch, wanted, atol=TOLERANCE)
    one = module.compute_score(
        data_source="hh", solution_str=items[2].response, ground_truth="", extra_info={"prompt": items[2].prompt}
    )
    assert one == pytest.approx(wanted[2], abs=TOLERANCE)
    with pytest.raises(DataError, match=r"hh: field 'extra_info\.prompt' is missing"):
        module.compute_score("hh", "a", None, {"index": 1})


def test_openrlhf_calls(serving, critics, monkeypatch, tmp_path):
    file = tmp_path / "token"
    url = serving(critics["first"], max_replicas=1, auth="on", token_file=str(file))
    monkeypatch.setenv("RLHF_CRITIC_URL", url)
    monkeypatch.setenv("RLHF_CRITIC_TOKEN_FILE", str(file))
    items = make_conversations(5)
    encoder = load_critic(critics["first"]).encoder
    queries = [encoder.render(*item) for item in items]
    prompts = [query[: -len(item.response + encoder.ending)] for query, item in zip(queries, items, strict=True)]
    # As a policy leaves them: one cut before its EOS, one padded with it.
    queries[0] = queries[0].removesuffix(encoder.ending)
    queries[1] += "</s></s>"
    answer = load_as_trainers_do(openrlhf).reward_func(queries, prompts, labels=[""] * 5)
    wanted = rewards_by_engine(critics["first"], items)
    np.testing.assert_allclose(answer["rewards"].numpy(), wanted, atol=TOLERANCE)
    assert torch.equal(answer["rewards"], answer["scores"])
    assert answer["extra_logs"] == {}
    json.dumps({name: value.tolist() for name, value in answer.items() if name != "extra_logs"})


def test_a_pool_that_nobody_named(monkeypatch):
    monkeypatch.delenv("RLHF_CRITIC_URL", raising=False)
    with pytest.raises(ConfigError, match="set RLHF_CRITIC_URL to the pool's address"):
        verl.compute_score("hh", "a", None, {"prompt": "b"})
    monkeypatch.setenv("RLHF_CRITIC_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("RLHF_CRITIC_TOKEN_FILE", "/nowhere/token")
    with pytest.raises(ConfigError, match="/nowhere/token cannot be read"):
        verl.compute_score("hh", "a", None, {"prompt": "b"})
