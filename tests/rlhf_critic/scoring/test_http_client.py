"""HTTP callers get the same errors as callers inside the cluster, whatever server answers."""

import json
import socket
import threading
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from rlhf_critic.errors import ConfigError, ScorerFailed, ScorerRejected, ScorerUnavailable, VersionMismatch
from rlhf_critic.scoring.http_client import connect_http
from rlhf_critic.scoring.http_schema import ScoreRequest, ScoreResponse
from rlhf_critic.scoring.items import Conversation, Scores

ASKED = [Conversation("p", "x" * number) for number in range(10)]


@contextmanager
def server(answer):
    """Runs a server on this machine. ``answer`` maps a request's JSON to a status and a body.

    Yields:
        Its URL, and the Authorization headers that it received.
    """
    shown = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            shown.append(self.headers.get("Authorization"))
            status, body = answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}/", shown
        http.shutdown()
        thread.join()


def lengths(body):
    """Answers with the length of each response as its reward."""
    items = [item.to_item() for item in ScoreRequest.model_validate(body).items]
    rewards_S = np.array([len(item.response) for item in items], dtype=np.float32)
    scores = Scores(rewards_S, "v1", np.zeros(len(items), np.bool_), np.ones(len(items), np.int64))
    return 200, ScoreResponse.of(scores).model_dump_json().encode()


def error(status, kind, message="told", **more):
    return status, json.dumps({"error": {"kind": kind, "message": message, **more}}).encode()


@pytest.mark.parametrize(
    ("token", "wanted"), [(None, None), ("secret", "Bearer secret"), ("secret\n", "Bearer secret")]
)
def test_scores_come_back_and_the_token_is_shown(token, wanted):
    with server(lengths) as (url, shown), connect_http(url, token, max_items_per_call=3) as client:
        assert client.score_items(ASKED).rewards_S.tolist() == list(range(10))
    assert shown == [wanted] * 4


@pytest.mark.parametrize("token", ["hush\nhush", "hüsh", "hush\0"])
def test_a_token_that_cannot_be_sent_is_refused_at_once_and_not_repeated(token):
    with pytest.raises(ConfigError, match="the bearer token has characters") as refused:
        connect_http("http://127.0.0.1:1", token)
    assert token not in str(refused.value)


def refuses_the_longest(body):
    for index, item in enumerate(body["items"]):
        if len(item["response"]) == 9:
            return error(422, "text_too_long", f"item {index} has 9 bytes", item=index)
    return lengths(body)


def test_an_item_is_named_by_its_place_in_the_whole_call():
    with (
        server(refuses_the_longest) as (url, _),
        connect_http(url, max_items_per_call=2) as client,
        pytest.raises(ScorerRejected, match="item 9 has 9 bytes") as refused,
    ):
        client.score_items(ASKED)
    assert (refused.value.kind, refused.value.item) == ("text_too_long", 9)


@pytest.mark.parametrize(
    ("answer", "raised", "what"),
    [
        (error(422, "empty_text", "item 0 is empty"), ScorerRejected, "item 0 is empty"),
        (error(401, "unauthorized"), ScorerRejected, "told"),
        (error(409, "version_mismatch"), VersionMismatch, "told"),
        (error(500, "failed"), ScorerFailed, "told"),
        ((404, b"<html>no such page"), ScorerRejected, "HTTP 404: <html>no such page"),
        ((200, b"<html>a login page"), ScorerFailed, "the answer holds no scores: '<html>a login page'"),
        ((200, b"{}"), ScorerFailed, "the answer holds no scores"),
        ((200, b'{"model_version": "v", "rewards": [null]}'), ScorerFailed, "the answer holds no scores"),
    ],
)
def test_what_asking_again_does_not_help_is_told_at_once(answer, raised, what):
    asked = []
    with (
        server(lambda body: asked.append(body) or answer) as (url, _),
        connect_http(url) as client,
        pytest.raises(raised, match=what),
    ):
        client.score_items(ASKED)
    assert len(asked) == 1


@pytest.mark.parametrize(
    "answer",
    [
        error(503, "unavailable"),
        error(429, "busy"),
        (500, b"a replica died"),
        (502, b""),
        (404, b"Path '/score' not found. Ping http://.../-/routes for available routes."),
    ],
)
def test_what_asking_again_may_help_is_asked_again(answer):
    answers = [answer] * 3
    with server(lambda body: answers.pop() if answers else lengths(body)) as (url, _), connect_http(url) as client:
        assert client.score_items(ASKED).rewards_S.tolist() == list(range(10))
    assert not answers


def test_nobody_there_is_said_after_the_deadline():
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with (
        connect_http(f"http://127.0.0.1:{port}") as client,
        pytest.raises(ScorerUnavailable, match=rf"within 0\.5 s \(http://127\.0\.0\.1:{port}: ConnectError"),
    ):
        client.score_items(ASKED, deadline_s=0.5)


@pytest.mark.parametrize("item", [Conversation("\ud800", "a"), Conversation({"a": object()}, "a"), object(), b"a"])
def test_what_json_cannot_say_is_refused_before_it_is_sent(item):
    with (
        server(lengths) as (url, shown),
        connect_http(url) as client,
        pytest.raises(ScorerRejected, match="JSON") as refused,
    ):
        client.score_items([item])
    assert refused.value.kind == "not_text"
    assert not shown


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "localhost", "http://", "ftp://there", "http://[::1", ""])
def test_a_url_that_is_none_is_refused_at_once(url):
    with pytest.raises(ConfigError, match=r"write http://HOST:PORT"):
        connect_http(url)
