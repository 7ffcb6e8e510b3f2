"""An error names the field as the caller wrote it, and OpenRLHF's client shows what is wrong."""

import asyncio
import json

import pytest

from actors.serving.http_api import build_app
from tests.actors.serving.test_http_limits import DIGEST, JSON, Service, ask, client_of

TURN = {"role": "user", "content": "a"}
OF_OPENRLHF = {**JSON, "User-Agent": "Python/3.12 aiohttp/3.13.1"}

FIELDS = {
    "a turn without content": (
        {"items": [{"prompt": [TURN, {"role": "user"}], "response": "a"}]},
        ".prompt[1].content",
    ),
    "content that is no text": (
        {"items": [{"prompt": [{"role": "user", "content": 3}], "response": "a"}]},
        ".prompt[0].content",
    ),
    "a prompt that is no text": ({"items": [{"prompt": 3, "response": "a"}]}, ".prompt"),
    "a part that is no text": (
        {"items": [{"prompt": [{**TURN, "content": [{"type": "image"}]}], "response": "a"}]},
        ".prompt[0].content",
    ),
    "a chat with a wrong role": ({"items": [{"messages": [{"role": "", "content": "a"}]}]}, ".messages[0].role"),
    "a negative id": ({"items": [{"token_ids": [5, -1]}]}, ".token_ids[1]"),
}


def error_of(answer):
    assert answer.status_code == 422
    return answer.json()["error"]


@pytest.mark.parametrize("what", FIELDS)
def test_the_field_at_fault_is_named_as_in_the_body(what):
    body, field = FIELDS[what]
    for before in ([], [{"text": "a"}]):
        items = [*before, *body["items"]]
        (answer,) = ask(Service(), ("POST", "/score", JSON, json.dumps({"items": items}).encode()))
        named = f"items[{len(before)}]{field}"
        error = error_of(answer)
        assert error["message"].startswith(f"{named}: ")
        assert error["param"] == named


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/get_reward", {"query": ["a", 3]}, "query[1]"),
        ("/get_reward", {"prompts": ["a"]}, "query"),
        ("/classify", {"messages": [{**TURN, "content": [{"type": "image"}]}]}, "messages[0].content"),
        ("/classify", {"input": "a", "activation": 3}, "activation"),
        ("/score", {}, "items"),
        ("/score", [], "the body"),
    ],
)
def test_other_endpoints_name_it_too(path, body, field):
    (answer,) = ask(Service(), ("POST", path, JSON, json.dumps(body).encode()))
    assert error_of(answer)["message"].startswith(f"{field}: ")


def refused(service, headers, body):
    async def main():
        async with client_of(build_app(lambda: service)) as client:
            request = {"content": json.dumps(body).encode(), "headers": headers, "follow_redirects": True}
            return await client.post("/get_reward", **request)

    return asyncio.run(main())


def test_openrlhf_client_is_told_at_the_address_of_the_error():
    """It logs nothing of an error but its status and address; aiohttp follows the redirect with the same body."""
    service = Service()
    answer = refused(service, OF_OPENRLHF, {"query": ["a", 3]})
    assert answer.url.params["why"] == error_of(answer)["message"]
    assert "query[1]" in answer.url.params["why"]
    assert service.refusals == ["invalid_request"], "counted once"
    answer = refused(Service(token_sha256=DIGEST), OF_OPENRLHF, {"query": ["a"]})
    assert answer.status_code == 401
    assert "bearer token is missing" in answer.url.params["why"]
    assert refused(Service(), OF_OPENRLHF, {"query": ["a"]}).json()["rewards"] == [0.0]


def test_other_clients_get_the_error_at_once():
    for headers, path in ((JSON, "/get_reward"), (OF_OPENRLHF, "/score")):
        (answer,) = ask(Service(), ("POST", path, headers, b"{}"))
        assert answer.status_code == 422


def test_the_request_of_llama_factory_is_one_of_openrlhf_by_another_name():
    (answer, wrong) = ask(
        Service(),
        ("POST", "/get_reward", JSON, b'{"model": "model", "messages": ["a", "b"]}'),
        ("POST", "/get_reward", JSON, b'{"model": "model", "messages": ["a", 3]}'),
    )
    assert answer.json()["scores"] == [0.0, 0.0]
    assert error_of(wrong)["param"] == "messages[1]"
