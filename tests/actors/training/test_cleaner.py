"""Where Ray's dashboard gives an unexpected answer, the cleaner of placement groups goes on without a traceback."""

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from actors.runtime.ray_internals import PlacementGroupCleaner, PlacementGroupCleanerCallback
from actors.training.cleaner import QuietCleaner, QuietCleanerCallback, with_quiet_cleaner
from tests.helpers import wait_until

CHECK_S, ANSWER_S, STOP_S = 0.05, 1, 5.0


@pytest.fixture
def thread_errors(monkeypatch):
    """Errors that ended a thread, each of which Python prints as a traceback."""
    errors: list[BaseException | None] = []
    monkeypatch.setattr(threading, "excepthook", lambda arguments: errors.append(arguments.exc_value))
    return errors


class Dashboard(BaseHTTPRequestHandler):
    """A server that answers with something else than a dashboard does."""

    def do_GET(self):
        self.server.asked += 1
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_):
        pass


@pytest.fixture
def dashboard(monkeypatch):
    with HTTPServer(("127.0.0.1", 0), Dashboard) as server:
        server.asked = 0
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", f"http://127.0.0.1:{server.server_port}")
        yield server
        server.shutdown()
        thread.join(10)


def test_an_unexpected_answer_ends_no_thread(dashboard, thread_errors):
    cleaner = QuietCleaner("00", CHECK_S, ANSWER_S, STOP_S)
    cleaner.start_monitoring()
    thread = cleaner._monitor_thread
    wait_until(lambda: dashboard.asked >= 2, "a second question", timeout=30)
    assert thread.is_alive()
    assert cleaner._stop_monitor_thread()
    assert not thread.is_alive()
    assert not thread_errors


def test_rays_own_cleaner_ends_with_a_traceback(dashboard, thread_errors):
    """If this fails, Ray does better now, and actors/training/cleaner.py can go."""
    cleaner = PlacementGroupCleaner("00", CHECK_S, ANSWER_S, STOP_S)
    cleaner.start_monitoring()
    wait_until(lambda: bool(thread_errors), "an error of the thread", timeout=30)


def test_rays_callback_is_replaced():
    other = object()
    replaced = with_quiet_cleaner([other, PlacementGroupCleanerCallback()])
    assert replaced[0] is other
    assert type(replaced[1]) is QuietCleanerCallback
