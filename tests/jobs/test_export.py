"""``export`` takes a directory, a URI or a hub id, and adapters with their base model."""

from pathlib import Path

import huggingface_hub.constants
import pytest

from jobs import export
from rlhf_critic.checkpoint.critic_directory import read_card
from tests.jobs.command_line import run
from tests.rlhf_critic.checkpoint.test_adapters import save_adapters
from tests.rlhf_critic.checkpoint.test_reward_model import save_reward_model


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache of the hub; returns the directory of the one version of the model ``owner/rm`` in it."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    model = cache / "models--owner--rm"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("0" * 40)
    return model / "snapshots" / ("0" * 40)


def test_a_hub_id_is_converted_under_its_own_name(hub, tmp_path, monkeypatch, capsys):
    save_reward_model(hub)
    code, _, message = run(export.main, ["owner/rm", str(tmp_path / "out")], monkeypatch, capsys)
    assert code == 0, message
    assert read_card(tmp_path / "out").version == "rm@native"


def test_a_hub_id_that_is_not_there_is_told(hub, tmp_path, monkeypatch, capsys):
    code, _, message = run(export.main, ["owner/other", str(tmp_path / "out")], monkeypatch, capsys)
    assert code == 2
    assert "owner/other: no such directory, and it could not be downloaded as the hub id" in message


def test_adapters_are_merged_into_the_base_that_is_given(tiny_model, tmp_path, monkeypatch, capsys):
    save_adapters(tiny_model, tmp_path / "adapters", "SEQ_CLS")
    arguments = [str(tmp_path / "adapters"), str(tmp_path / "out")]
    code, _, message = run(export.main, arguments, monkeypatch, capsys)
    assert code == 2
    assert "adapters of peft" in message
    assert "--base" in message
    code, _, message = run(export.main, [*arguments, "--base", tiny_model], monkeypatch, capsys)
    assert code == 0, message
    assert read_card(Path(arguments[1])).version == "adapters@native"
