"""The endpoints are closed unless they are opened on purpose, and a caller cannot take up time, memory or places."""

import asyncio
import hashlib
import json
import time
import tracemalloc

import httpx
import numpy as np
import pytest

from actors.serving import http_api
from actors.serving.http_api import HttpSettings, build_app
from rlhf_critic.config.serve import CallLimits
from rlhf_critic.errors import ConfigError
from rlhf_critic.scoring.items import ScorerInfo, Scores

DIGEST = hashlib.sha256(b"a secret of some length").hexdigest()
GOOD = b'{"items": [{"prompt": "p", "response": "r"}]}'
JSON = {"Content-Type": "application/json"}
MB = 2**20


class Service:
    """Scores every item with zero, once ``may_answer`` is set."""

    def __init__(self, **settings):
        self.settings = HttpSettings(**settings)
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.refusals = []

    def itself(self):
        return self

    async def score(self, items, values, version):
        await self.may_answer.wait()
        zeros_S = np.zeros(len(items), dtype=np.float32)
        return Scores(zeros_S, "v1", zeros_S.astype(np.bool_), zeros_S.astype(np.int64))

    async def info(self):
        return ScorerInfo("v1", "c", "f", 64, CallLimits(), False, {"critic": 1.0})

    async def replicas(self):
        return []

    async def published(self):
        return []

    def on_refusal(self, kind):
        self.refusals.append(kind)


def client_of(app, base="http://127.0.0.1:8000"):
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=base)


def ask(service, *requests):
    """Sends requests one after another. Each is a method, a path, headers and a body."""

    async def main():
        async with client_of(build_app(lambda: service)) as client:
            return [
                await client.request(method, path, headers=headers, content=body)
                for method, path, headers, body in requests
            ]

    return asyncio.run(main())


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
@pytest.mark.parametrize(
    "digest",
    ["", "change-me", DIGEST[:-1], DIGEST.upper(), f"{DIGEST}\n", 7, *sorted(http_api.KNOWN_TOKENS)],
)
def test_a_digest_of_no_secret_is_refused_everywhere(digest, host):
    with pytest.raises(ConfigError, match="token_sha256: expected the SHA-256 of a secret token"):
        HttpSettings(token_sha256=digest, host=host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "example.org", ""])
def test_without_a_digest_only_loopback_is_served_unless_opened_on_purpose(host):
    with pytest.raises(ConfigError, match="token_sha256 is missing, and other machines can reach"):
        HttpSettings(host=host)
    for off in ("off", False):  # YAML reads off as False
        assert HttpSettings(host=host, auth=off)
    assert HttpSettings(host=host, token_sha256=DIGEST)
    with pytest.raises(ConfigError, match="expected auto or off"):
        HttpSettings(host=host, auth="of")


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_loopback_needs_no_token(host):
    assert ask(Service(host=host), ("POST", "/score", JSON, GOOD))[0].status_code == 200


PAGES = {
    "DNS rebinding": {"Host": "attacker.example:8000", "Origin": "http://attacker.example:8000"},
    "DNS rebinding without an origin": {"Host": "attacker.example:8000"},
    "DNS rebinding that the browser calls its own": {"Host": "attacker.example:8000", "Sec-Fetch-Site": "same-origin"},
    "a name that ends like ours": {"Host": "127.0.0.1.attacker.example:8000"},
    "another site": {"Origin": "https://attacker.example"},
    "another port": {"Origin": "http://127.0.0.1:9999"},
    "a page without an origin": {"Origin": "null"},
    "a browser that says so": {"Sec-Fetch-Site": "cross-site"},
    "a neighbouring site": {"Sec-Fetch-Site": "same-site"},
    "no address": {"Host": "[::1"},
}


@pytest.mark.parametrize("page", PAGES)
def test_a_web_page_cannot_use_a_pool_without_a_token(page):
    service = Service()
    answers = ask(
        service,
        *[(method, path, {**JSON, **PAGES[page]}, GOOD) for method, path in (("POST", "/score"), ("GET", "/info"))],
        ("GET", "/health", PAGES[page], b""),
    )
    assert [answer.status_code for answer in answers] == [403] * 3
    assert answers[0].json()["error"]["kind"] == "forbidden"
    assert service.refusals == ["forbidden"] * 3


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Host": "localhost:9000"},
        {"Host": "[::1]:8000"},
        {"Host": "127.0.0.1:8000", "Origin": "http://127.0.0.1:8000"},
        {"Sec-Fetch-Site": "none"},
    ],
)
def test_programs_and_the_pools_own_pages_are_answered(headers):
    assert ask(Service(), ("POST", "/score", {**JSON, **headers}, GOOD))[0].status_code == 200


def test_a_body_without_a_content_type_and_a_preflight_are_refused():
    body, preflight = ask(
        Service(),
        ("POST", "/score", {}, GOOD),
        ("OPTIONS", "/score", {"Access-Control-Request-Method": "POST"}, b""),
    )
    assert (body.status_code, preflight.status_code) == (422, 405)
    assert not [name for name in preflight.headers if name.lower().startswith("access-control")]


def test_a_proxy_may_use_any_name_where_opened_on_purpose():
    service = Service(host="0.0.0.0", auth="off")
    named, page = ask(
        service,
        ("POST", "/score", {**JSON, "Host": "scorers.internal"}, GOOD),
        ("POST", "/score", {**JSON, "Host": "scorers.internal", "Sec-Fetch-Site": "cross-site"}, GOOD),
    )
    assert (named.status_code, page.status_code) == (200, 403)


MANY = {
    "items": ("/score", b'{"items":[%s]}' % b",".join([b'{"text":"a"}'] * 1_200_000)),
    "items in a list": ("/score", b'{"items":[[%s]]}' % b",".join([b"[]"] * 5_000_000)),
    "ids": ("/classify", b'{"input":[%s]}' % b",".join([b"[1]"] * 3_700_000)),
    "queries": ("/get_reward", b'{"query":[%s]}' % b",".join([b'"a"'] * 3_700_000)),
    "just enough to be parsed": ("/score", b'{"items":[%s]}' % b",".join([b'{"text":"a"}'] * 80_000)),
}


@pytest.mark.parametrize("kind", MANY)
def test_a_million_items_are_refused_before_they_cost_anything(kind):
    path, body = MANY[kind]
    assert len(body) < 16 * MB
    service = Service()
    ask(service, ("POST", "/score", JSON, GOOD))  # builds the validators

    def refused():
        (answer,) = ask(service, ("POST", path, JSON, body))
        assert (answer.status_code, answer.json()["error"]["kind"]) == (422, "too_many_items")

    started = time.process_time()
    refused()
    assert time.process_time() - started < 0.7
    tracemalloc.start()
    try:
        refused()
        assert tracemalloc.get_traced_memory()[1] < 100 * MB
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "text",
    ['"' * 300_000, "{[" * 300_000, "\\" * 300_000, '\\"' * 300_000, '{"a": ["b\\\\"]}, ' * 50_000],
    ids=["quotes", "braces", "backslashes", "escapes", "JSON"],
)
def test_the_text_of_an_item_does_not_count_as_items(text):
    body = json.dumps({"items": [{"text": text}]}).encode()
    assert ask(Service(max_items=8), ("POST", "/score", JSON, body))[0].status_code == 200
    one_more = json.dumps({"items": [{"text": text}] * 9}).encode()
    assert ask(Service(max_items=8), ("POST", "/score", JSON, one_more))[0].status_code == 422


def test_token_ids_are_one_item_and_have_a_limit():
    body = json.dumps({"input": [5] * 30_000}).encode()
    too_long = json.dumps({"items": [{"token_ids": [5] * (2**20 + 1)}]}).encode()
    fits, refused = ask(Service(), ("POST", "/classify", JSON, body), ("POST", "/score", JSON, too_long))
    assert (fits.status_code, refused.status_code) == (200, 422)


def test_large_bodies_together_have_a_limit_and_leave_nothing_behind():
    text = json.dumps({"items": [{"text": "a" * (2 * MB - 100)}]}).encode()

    async def main():
        service = Service(max_body_bytes=2 * MB)
        service.may_answer.clear()
        app = build_app(lambda: service)
        async with client_of(app) as client:
            calls = [asyncio.create_task(client.post("/score", content=text, headers=JSON)) for _ in range(50)]
            while len(service.refusals) < 50 - http_api.BODIES_AT_ONCE:
                await asyncio.sleep(0.01)
            service.may_answer.set()
            answers = await asyncio.gather(*calls)
            assert sorted({answer.status_code for answer in answers}) == [200, 503]
            assert sum(answer.status_code == 200 for answer in answers) == http_api.BODIES_AT_ONCE
            (refused, *_) = (answer for answer in answers if answer.status_code == 503)
            assert refused.json()["error"]["kind"] == "unavailable"
            assert refused.headers["Retry-After"] == "1"
            for _ in range(2 * http_api.BODIES_AT_ONCE):  # their memory is free again
                assert (await client.post("/score", content=text, headers=JSON)).status_code == 200

    asyncio.run(asyncio.wait_for(main(), 60))


def test_a_body_that_does_not_arrive_ends_and_does_not_hold_up_others(monkeypatch):
    monkeypatch.setattr(http_api, "BODY_TIMEOUT_S", 0.3)

    async def drip():
        while True:
            yield b" "
            await asyncio.sleep(0.02)

    async def main():
        async with client_of(build_app(Service().itself)) as client:
            slow = [asyncio.create_task(client.post("/score", content=drip(), headers=JSON)) for _ in range(20)]
            await asyncio.sleep(0.05)
            assert (await client.post("/score", content=GOOD, headers=JSON)).status_code == 200
            answers = await asyncio.gather(*slow)
            assert {(answer.status_code, answer.json()["error"]["kind"]) for answer in answers} == {
                (408, "body_too_slow")
            }

    asyncio.run(asyncio.wait_for(main(), 30))
