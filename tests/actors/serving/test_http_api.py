"""The HTTP endpoints reject each kind of invalid request with its own error, and keep serving."""

import json
import logging

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, settings

from actors.serving.http_api import build_app
from jobs.serve import read_token
from rlhf_critic.errors import ScorerRejected
from rlhf_critic.scoring.http_client import connect_http
from tests.actors.scorers import make_conversations, rewards_by_engine

GOOD = {"items": [{"prompt": "please", "response": "of course"}]}
ITEM = GOOD["items"][0]
MAX_BODY_BYTES = 2_000_000
BAD = {
    "an empty list": ("/score", {"items": []}, 422, "invalid_request"),
    "an empty text": ("/score", {"items": [{"text": ""}]}, 422, "invalid_request"),
    "nothing at all": ("/score", {"items": [{"prompt": "", "response": ""}]}, 422, "empty_text"),
    "no text": ("/score", {"items": [{"prompt": 3, "response": "a"}]}, 422, "invalid_request"),
    "a field that is not known": ("/score", {**GOOD, "temperature": 1}, 422, "invalid_request"),
    "a text of 1 MB": ("/score", {"items": [{"text": "a" * 1_000_000}]}, 422, "text_too_long"),
    "a text of too many tokens": ("/score", {"items": [{"text": "1 " * 5000}]}, 422, "too_many_tokens"),
    "10,000 texts": ("/score", {"items": [ITEM] * 10_000}, 422, "too_many_items"),
    "a body that is too large": ("/score", {"items": [{"text": "a" * 2_000_000}]}, 413, "body_too_large"),
    "an id out of the vocabulary": ("/score", {"items": [{"token_ids": [1, 100_000]}]}, 422, "bad_token_id"),
    "a negative id": ("/score", {"items": [{"token_ids": [-1]}]}, 422, "invalid_request"),
    "no ids": ("/score", {"items": [{"token_ids": []}]}, 422, "invalid_request"),
    "another version": ("/score", {**GOOD, "version": "other@7"}, 409, "version_mismatch"),
    "NaN": ("/score", b'{"items": NaN}', 400, "bad_request"),
    "NaN where anything may stand": ("/get_reward", b'{"query": ["a"], "labels": NaN}', 400, "bad_request"),
    "no JSON": ("/score", b'{"items": [', 400, "bad_request"),
    "no UTF-8": ("/score", b'{"items": [{"text": "\xff"}]}', 400, "bad_request"),
    "half a surrogate pair": ("/score", b'{"items": [{"text": "\\ud800"}]}', 422, "invalid_request"),
    "more prompts than queries": ("/get_reward", {"query": ["a"], "prompts": ["a", "b"]}, 422, "unequal_lengths"),
    "no queries": ("/get_reward", {"query": []}, 422, "no_items"),
    "an empty query": ("/get_reward", {"query": [""], "prompts": None}, 422, "empty_text"),
    "a chat that ends with a question": (
        *("/score", {"items": [ITEM, {"messages": [{"role": "user", "content": "a"}]}]}),
        *(422, "no_response"),
    ),
    "such a chat to be classified": ("/classify", {"messages": [{"role": "user", "content": "a"}]}, 422, "no_response"),
    "no input": ("/classify", {"model": None}, 422, "no_items"),
    "another version to classify": ("/classify", {"version": "gpt-9", "input": "a"}, 409, "version_mismatch"),
    "an unknown place": ("/nowhere", GOOD, 404, "not_found"),
}


@pytest.fixture
def url(serving, critics):
    """Starts a pool with tight limits; returns its URL."""
    return serving(critics["first"], max_replicas=1, max_body_bytes=MAX_BODY_BYTES, max_tokens=4096)


@pytest.mark.parametrize("what", BAD)
def test_bad_input(what, url):
    path, body, status, kind = BAD[what]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = httpx.post(url + path, content=content, headers={"Content-Type": "application/json"}, timeout=60)
    assert (answer.status_code, answer.json()["error"]["kind"]) == (status, kind), answer.text
    assert len(answer.json()["error"]["message"]) < 500
    assert httpx.post(f"{url}/score", json=GOOD, timeout=60).status_code == 200


def test_a_body_without_a_length_is_limited_too(url):
    def pieces():
        for _ in range(100):
            yield b" " * 100_000

    answer = httpx.post(f"{url}/score", content=pieces(), headers={"Content-Type": "application/json"}, timeout=60)
    assert (answer.status_code, answer.json()["error"]["kind"]) == (413, "body_too_large")


def test_health_and_info(url):
    told = httpx.get(f"{url}/info", timeout=60).json()
    assert httpx.get(f"{url}/health", timeout=60).json() == {"status": "ready", "model_version": told["model_version"]}
    assert told["model_version"].startswith("tiny@1#")
    assert told["limits"]["max_body_bytes"] == MAX_BODY_BYTES
    assert told["limits"]["max_tokens"] == 4096
    assert httpx.get(f"{url}/score", timeout=60).status_code == 405


def test_a_pool_with_a_token_answers_only_those_who_show_it(serving, critics, tmp_path, caplog):
    file = tmp_path / "token"
    url = serving(critics["first"], max_replicas=1, auth="on", token_file=str(file))
    token = read_token(str(file))
    assert file.stat().st_mode & 0o777 == 0o600
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {token}"}):
        for method, path in (("POST", "/score"), ("POST", "/get_reward"), ("POST", "/classify"), ("GET", "/info")):
            answer = httpx.request(method, url + path, json=GOOD, headers=headers, timeout=60)
            assert (answer.status_code, answer.json()["error"]["kind"]) == (401, "unauthorized")
            assert answer.headers["WWW-Authenticate"] == "Bearer"
    for unread in (b"[", b" " * 20_000_000):  # the pool reads no body without a token
        assert httpx.post(f"{url}/score", content=unread, timeout=60).status_code == 401
    assert httpx.get(f"{url}/openapi.json", timeout=60).status_code == 401
    assert httpx.get(f"{url}/health", timeout=60).status_code == 200
    items = make_conversations(3)
    with connect_http(url, token) as client, caplog.at_level(logging.DEBUG):
        rewards = client.score_items(items).rewards_S
    assert rewards == pytest.approx(rewards_by_engine(critics["first"], items), abs=1e-5)
    assert token not in caplog.text
    with connect_http(url, "wrong") as client, pytest.raises(ScorerRejected) as refused:
        client.score_items(items)
    assert refused.value.kind == "unauthorized"


@pytest.fixture(scope="module")
def guarded(serving, critics, tmp_path_factory):
    """Yields the URL and the token of a pool with authentication."""
    file = str(tmp_path_factory.mktemp("secret") / "token")
    url = serving(critics["first"], max_replicas=1, auth="on", token_file=file)
    return url, {"Authorization": f"Bearer {read_token(file)}"}


schema = schemathesis.openapi.from_dict(build_app(lambda: None).openapi())  # type: ignore[arg-type]


@schema.parametrize()
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_no_request_gets_more_than_the_openapi_document_promises(case, guarded):
    url, headers = guarded
    case.call_and_validate(
        base_url=url,
        headers=headers,
        # A request that matches the document may still be rejected: the document does not contain the vocabulary.
        excluded_checks=[schemathesis.checks.CHECKS.get_one("positive_data_acceptance")],
    )
