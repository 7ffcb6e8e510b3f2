"""docs/examples/train_loop.py runs as it is, learns, and leaves a critic that loads."""

import importlib.util

from rlhf_critic.checkpoint.critic_directory import load_critic
from tests.docs.pages import TOP

EXAMPLE = TOP / "docs" / "examples" / "train_loop.py"


def test_the_loop_learns_and_saves_a_critic(tiny_model, preference_file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location("train_loop", EXAMPLE)
    train_loop = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(train_loop)
    accuracy = train_loop.main(tiny_model, preference_file, "out")
    assert accuracy > 0.7
    assert "step 12/12 loss" in capsys.readouterr().out
    assert load_critic(tmp_path / "out").card.version == "train-loop@12"


def test_the_file_stays_readable():
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) <= 100
