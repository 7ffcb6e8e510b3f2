"""``jobs.serve`` on the command line against a running cluster: start, publish, reject, stop."""

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from actors.serving import control
from actors.serving.handle import connect
from jobs import serve
from jobs.serve import read_token
from rlhf_critic.config.serve import ServeJobConfig
from rlhf_critic.errors import ConfigError
from tests.actors.scorers import make_conversations, rewards_by_engine
from tests.helpers import run_command
from tests.jobs.command_line import run

APP = ("--app", "typed")
COMPONENTS = """
components:
- {kind: critic}
- {kind: length_penalty, weight: 0.1}
- {kind: regex, name: asks, pattern: '\\?'}
"""


@pytest.mark.timeout(400)
def test_start_publish_and_stop(serve_port, critics, ray_address, tmp_path, monkeypatch, capsys):
    control.start_serve(ServeJobConfig(checkpoint="-", port=serve_port), authenticated=False)
    code, _, message = run(serve.main, [critics["second"], "--publish", *APP], monkeypatch, capsys)
    assert code == 2
    assert "there is no pool 'typed' to publish to: start it with python -m jobs.serve" in message

    (tmp_path / "rewards.yaml").write_text(COMPONENTS)
    options = ["--components", "rewards.yaml", "--port", str(serve_port), *APP]
    started = run_command(["-m", "jobs.serve", critics["first"], *options], tmp_path, {"RAY_ADDRESS": ray_address})
    assert started.returncode == 0, started.stderr
    assert "typed serves tiny@1#" in started.stderr
    assert f"http://127.0.0.1:{serve_port}/typed" in started.stderr
    items = make_conversations(4)
    with connect("typed") as client:
        scores = client.score_items(items)
        assert set(scores.components) == {"critic", "length_penalty", "asks"}
        assert scores.components["critic"] == pytest.approx(rewards_by_engine(critics["first"], items), abs=1e-5)
        parts = scores.components
        total = parts["critic"] + 0.1 * parts["length_penalty"] + parts["asks"]
        assert scores.rewards_S == pytest.approx(total, abs=1e-5)

        code, _, message = run(serve.main, [critics["second"], "--publish", *APP], monkeypatch, capsys)
        assert code == 0
        assert "every replica of 'typed' serves tiny@2#" in message
        scores = client.score_items(items)
        assert scores.components["critic"] == pytest.approx(rewards_by_engine(critics["second"], items), abs=1e-5)
        assert "asks" in scores.components, "publishing leaves other options as they are"

        cut = shutil.copytree(critics["first"], tmp_path / "cut")
        (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-100])
        code, _, message = run(serve.main, [str(cut), "--publish", *APP], monkeypatch, capsys)
        assert code == 2
        assert "model.safetensors: damaged, or not a weights file" in message
        assert client.score_items(items).model_version == scores.model_version

    assert run(serve.main, ["--stop", *APP], monkeypatch, capsys)[0] == 0
    assert not control.is_running("typed")
    assert run(serve.main, ["--stop", *APP], monkeypatch, capsys)[0] == 2
    assert httpx.get(f"http://127.0.0.1:{serve_port}/typed/health", timeout=30).status_code == 404


def test_a_token_file_that_others_may_read_or_guess_is_refused(tmp_path):
    file = tmp_path / "deep" / "token"
    token = read_token(str(file))
    assert read_token(str(file)) == token
    assert len(token) > 40
    file.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        read_token(str(file))
    file.write_text("secret")
    file.chmod(0o600)
    with pytest.raises(ConfigError, match="can be guessed"):
        read_token(str(file))


def test_two_first_starts_have_one_token(tmp_path):
    for number in range(20):
        path = tmp_path / str(number) / "token"
        ready = threading.Barrier(4)

        def start(path=path, ready=ready):
            ready.wait(30)
            return read_token(str(path))

        with ThreadPoolExecutor(4) as starts:
            tokens = {one.result(30) for one in [starts.submit(start) for _ in range(4)]}
        assert len(tokens) == 1
        assert [one.name for one in path.parent.iterdir()] == ["token"]


def test_serve_off_loopback_wants_a_token():
    assert control.is_loopback("127.0.0.1")
    assert control.is_loopback("::1")
    assert control.is_loopback("localhost")
    for host in ("0.0.0.0", "10.1.2.3", "::", "example.org"):
        assert not control.is_loopback(host)
