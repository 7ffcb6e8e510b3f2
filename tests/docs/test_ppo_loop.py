"""docs/examples/ppo_loop.py runs as it is, learns, and leaves a critic that loads."""

import importlib.util

import pytest

from rlhf_critic.checkpoint.critic_directory import load_critic
from tests.docs.pages import TOP

EXAMPLE = TOP / "docs" / "examples" / "ppo_loop.py"


def load_example():
    spec = importlib.util.spec_from_file_location("ppo_loop", EXAMPLE)
    ppo_loop = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ppo_loop)
    return ppo_loop


@pytest.mark.slow
def test_the_loop_learns_and_saves_a_critic(ray_address, tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    last = load_example().main(tiny_model, "out")
    first = float(capsys.readouterr().out.split("reward ")[1].split(",")[0])
    assert last > first + 1.0
    assert load_critic(tmp_path / "out").card.version == "critic@20"


def test_the_file_stays_readable_and_its_imports_exist():
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) <= 75
    assert load_example().SAMPLES > 1
