"""HTTP callers get the same errors as callers inside the cluster, whatever server answers."""

import json
import socket
import threading
import time
from contextlib import closing, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_critic.errors import (
    ConfigError,
    CriticError,
    ScorerFailed,
    ScorerRejected,
    ScorerUnavailable,
    VersionMismatch,
)
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


GOOD = {"model_version": "v1", "rewards": [0.5], "truncated": [False], "tokens": [3], "components": {}}
numbers = st.one_of(st.integers(), st.floats(), st.booleans(), st.none(), st.text(max_size=3))
lists = st.one_of(st.lists(numbers, max_size=3), st.lists(st.floats(width=32), max_size=3), numbers)
lies = st.fixed_dictionaries(
    {},
    optional={
        "model_version": numbers,
        "rewards": lists,
        "truncated": lists,
        "tokens": lists,
        "components": st.one_of(st.dictionaries(st.text(max_size=2), lists, max_size=2), numbers),
        "values": lists | st.lists(lists, max_size=2),
    },
)


def test_a_server_that_lies_gives_finite_rewards_or_a_typed_error():
    """Fuzzes the answer: short, long, wrong types, NaN, numbers beyond fp32 and int64."""
    told = {}
    with server(lambda _: (200, told["body"])) as (url, _), connect_http(url) as client:

        @settings(max_examples=150, deadline=None, derandomize=True)
        @given(lies, st.booleans())
        def ask(lie, values):
            told["body"] = json.dumps({**GOOD, **lie}).encode()
            try:
                scores = client.score_items(ASKED[:1], values=values, deadline_s=10)
            except CriticError:
                return
            assert scores.rewards_S.shape == (1,)
            assert np.isfinite(scores.rewards_S).all()

        ask()


@pytest.mark.parametrize("rewards", ['["0.5"]', "[true]", "[NaN]", "[1e39]", "[1e400]", "[0.5, 0.5]", "[]", "0.5"])
def test_a_reward_is_one_finite_number(rewards):
    body = json.dumps(GOOD).replace("[0.5]", rewards).encode()
    with server(lambda _: (200, body)) as (url, _), connect_http(url) as client, pytest.raises(ScorerFailed):
        client.score_items(ASKED[:1], deadline_s=10)


def test_a_server_that_answers_in_part_and_then_sleeps_costs_the_deadline():
    """The first bytes of an answer, and no end."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:

        def serve():
            with suppress(OSError):
                while True:
                    connection, _ = listening.accept()
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{")
                    connection.shutdown(socket.SHUT_WR) if len(kept) % 2 else None
                    kept.append(connection)

        kept = []
        threading.Thread(target=serve, daemon=True).start()
        started = time.monotonic()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        with connect_http(url) as client, pytest.raises(ScorerUnavailable, match="no scorer answered"):
            client.score_items(ASKED[:1], deadline_s=1)
        assert time.monotonic() - started < 20
        listening.shutdown(socket.SHUT_RDWR)
        for connection in kept:
            connection.close()


@pytest.mark.parametrize("url", ["http://me:s3cret@127.0.0.1:1", "http://me:s3cret@[", "https://token@host"])
def test_a_password_in_a_url_is_refused_and_not_repeated(url):
    with pytest.raises(ConfigError, match="must not hold a user or password") as refused:
        connect_http(url)
    assert "s3cret" not in str(refused.value)


def test_a_client_that_closes_while_others_ask_never_mixes_event_loops():
    with server(lengths) as (url, _):
        client = connect_http(url, deadline_s=30)
        asked = []

        def ask():
            asked.extend(client.submit(ASKED[:2]) for _ in range(20))

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            client.close()
        client.close()
        for future in asked:
            assert future.cancelled() or future.result(30).rewards_S.tolist() == [0.0, 1.0]
