"""The classification endpoint answers as clients of vLLM and OpenAI expect, with the critic's own rewards."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import httpx
import numpy as np
import pytest

from actors.serving.http_api import HttpSettings, build_app
from actors.serving.scorer import Scorer
from rlhf_critic.checkpoint.reward_model import open_reward_model
from rlhf_critic.config.serve import ScorerConfig
from rlhf_critic.scoring.items import Conversation
from tests.helpers import CHAT_TEMPLATE
from tests.rlhf_critic.checkpoint.test_reward_model import plain_scores, save_reward_model

PAIR = ("please explain", "of course")
CHAT = [{"role": "user", "content": PAIR[0]}, {"role": "assistant", "content": PAIR[1]}]


class Service:
    """A scorer in this process behind the endpoints."""

    def __init__(self, checkpoint: str) -> None:
        self.settings = HttpSettings()
        self.scorer = Scorer(ScorerConfig(checkpoint=checkpoint))

    async def score(self, items: Any, values: bool, version: str | None) -> Any:
        return await self.scorer.score_async(items, values=values, version=version)

    async def info(self) -> Any:
        return self.scorer.info()

    async def replicas(self) -> list[Any]:
        return []

    async def published(self) -> list[Any]:
        return []

    def on_refusal(self, kind: str) -> None:
        pass

    def ask(self, path: str, body: Any = None) -> httpx.Response:
        async def main() -> httpx.Response:
            transport = httpx.ASGITransport(build_app(lambda: self))
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
                return await client.request("GET" if body is None else "POST", path, json=body)

        return asyncio.run(main())

    def reward(self, **body: Any) -> float:
        answer = self.ask("/classify", body)
        assert answer.status_code == 200, answer.text
        return float(answer.json()["data"][0]["probs"][0])


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    directory = save_reward_model(
        tmp_path_factory.mktemp("model"), adds_bos=True, chat_template="{{ bos_token }}" + CHAT_TEMPLATE
    )
    service = Service(str(directory))
    yield service
    service.scorer.close()


@pytest.fixture(scope="module")
def expected(service):
    return float(service.scorer.score([Conversation(*PAIR)]).rewards_S[0])


@pytest.fixture(scope="module")
def encoder(service):
    return open_reward_model(service.scorer.info().checkpoint, "model").encoder


def test_every_form_of_a_text_has_its_reward(service, expected, encoder):
    text = encoder.render(*PAIR)
    ids = encoder.encode(*PAIR).ids
    assert text.startswith("<s>")
    (plain,) = plain_scores(service.scorer.info().checkpoint, [ids])
    assert expected == pytest.approx(plain, abs=1e-5)
    parts = [
        {**turn, "content": [{"type": "text", "text": turn["content"]}], "name": "somebody", "refusal": None}
        for turn in CHAT
    ]
    for body in ({"input": text}, {"input": [text]}, {"input": ids}, {"input": [ids]}, {"messages": CHAT}):
        assert service.reward(**body) == pytest.approx(expected, abs=1e-6), body
    assert service.reward(messages=parts) == pytest.approx(expected, abs=1e-6)
    without_bos = text.removeprefix("<s>")  # as verl sends it, because vLLM adds BOS
    assert service.reward(input=without_bos) == pytest.approx(expected, abs=1e-6)
    bare = service.reward(input=without_bos, add_special_tokens=False)
    (plain,) = plain_scores(service.scorer.info().checkpoint, [ids[1:]])
    assert bare == pytest.approx(plain, abs=1e-5)
    assert abs(bare - expected) > 1e-3


def test_any_model_is_echoed_and_a_version_is_asked_for_by_its_own_field(service):
    (listed,) = service.ask("/v1/models").json()["data"]
    served = service.scorer.info()
    assert (listed["id"], listed["object"]) == (served.model_version, "model")
    assert listed["max_model_len"] == served.max_length
    answer = service.ask("/classify", {"model": "/models/rm", "input": "please"}).json()
    assert (answer["model"], answer["model_version"]) == ("/models/rm", served.model_version)
    answer = service.ask("/classify", {"input": "please", "version": served.model_version}).json()
    assert answer["model"] == served.model_version
    refused = service.ask("/classify", {"input": "please", "version": "another"})
    assert refused.status_code == 409
    assert refused.json()["error"]["type"] == "ConflictError"


def test_an_activation_is_applied_only_on_request(service, expected):
    for off in ({}, {"use_activation": False}, {"use_activation": None}, {"activation": False}):
        assert service.reward(messages=CHAT, **off) == pytest.approx(expected, abs=1e-6)
    assert service.reward(messages=CHAT, use_activation=True) == pytest.approx(1 / (1 + np.exp(-expected)), abs=1e-6)


def test_the_last_tokens_are_kept_and_truncation_is_reported(service, encoder):
    ids = encoder.encode(*PAIR).ids
    (plain,) = plain_scores(service.scorer.info().checkpoint, [ids[-3:]])
    for body in ({"input": encoder.render(*PAIR)}, {"input": ids}, {"messages": CHAT}):
        answer = service.ask("/classify", {**body, "truncate_prompt_tokens": 3}).json()
        assert answer["data"][0]["probs"] == pytest.approx([plain], abs=1e-5)
        assert answer["truncated"] == [True]
        assert answer["usage"]["prompt_tokens"] == 3
        for whole in (-1, len(ids), 1000):
            answer = service.ask("/classify", {**body, "truncate_prompt_tokens": whole}).json()
            assert answer["truncated"] == [False]
    long = "please " * 600
    answer = service.ask("/classify", {"input": [long, "please"]}).json()
    assert answer["truncated"] == [True, False]
    assert service.ask("/get_reward", {"query": [long, "please"]}).json()["truncated"] == [True, False]


ERRORS = {
    "a wrong field": ("/classify", {"input": "a", "truncate_prompt_tokens": "x"}, 422, "truncate_prompt_tokens"),
    "no tokens": ("/classify", {"input": "a", "truncate_prompt_tokens": 0}, 422, "truncate_prompt_tokens"),
    "an image": (
        "/classify",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        422,
        "messages",
    ),
    "neither": ("/classify", {"model": "m"}, 422, None),
    "an unknown place": ("/v1/nothing", {}, 404, None),
}


@pytest.mark.parametrize("what", ERRORS)
def test_errors_have_the_fields_of_openai(service, what):
    path, body, status, param = ERRORS[what]
    answer = service.ask(path, body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (status, status), answer.text
    assert error["type"] == {404: "NotFoundError", 422: "BadRequestError"}[status]
    assert error["message"]
    assert re.split(r"[.\[]", error["param"] or "")[0] == (param or "")
