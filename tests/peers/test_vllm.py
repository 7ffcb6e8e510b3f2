"""vLLM on a CPU serves an export with our rewards, and its server answers in the form of our /classify."""

import socket
import time
from contextlib import closing

import httpx
import pytest

from rlhf_critic.scoring.http_schema import ClassifyResponse

START_TIMEOUT_S = 300


@pytest.fixture(scope="module")
def ask(export, texts):
    """Starts vLLM once; returns its answer."""
    answers = []

    def once(contract):
        if not answers:
            answers.append(contract.run("ask_vllm", {"model": export, "texts": texts, "max_length": 512}))
        return answers[0]

    return once


def test_vllm_classifies_with_our_rewards_if_asked_for_raw_scores(peer, ask, rewards, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    contract = peer("vllm")
    contract.compare("our export: LLM.classify, use_activation=False", ask(contract)["raw"], rewards)


def test_vllm_classifies_with_our_rewards_without_options(peer, ask, rewards, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    contract = peer("vllm")
    contract.compare("our export: LLM.classify without options", ask(contract)["as_it_is"], rewards)


def test_its_server_answers_in_the_form_of_our_classify(peer, export, texts, rewards, monkeypatch, tmp_path):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    contract = peer("vllm")
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = {"--model": export, "--runner": "pooling", "--dtype": "float32", "--host": "127.0.0.1", "--port": port}
    options |= {"--max-model-len": 512, "--served-model-name": "critic"}
    words = [str(word) for option in options.items() for word in option]
    log = tmp_path / "server.log"
    with contract.serve(["-m", "vllm.entrypoints.openai.api_server", *words], log) as server:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            assert server.poll() is None, log.read_text(errors="replace")[-3000:]
            assert time.monotonic() < deadline, f"no server within {START_TIMEOUT_S} s"
            try:
                if httpx.get(f"{url}/health", timeout=2).status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(1)
        asked = {"model": "critic", "input": texts, "use_activation": False}
        answer = httpx.post(f"{url}/classify", json=asked, timeout=120).raise_for_status().json()
    theirs = ClassifyResponse.model_validate({**answer, "usage": answer["usage"]}, extra="ignore")
    contract.compare("our export: its /classify", [one.probs[0] for one in theirs.data], rewards)
