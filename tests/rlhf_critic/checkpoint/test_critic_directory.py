"""A critic directory is complete or rejected, and gives the same scores wherever it is loaded."""

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from rlhf_critic.checkpoint import critic_directory
from rlhf_critic.checkpoint.critic_directory import (
    CARD_NAME,
    check_critic,
    load_critic,
    save_critic,
)
from rlhf_critic.checkpoint.export import export_critic
from rlhf_critic.errors import CheckpointError
from rlhf_critic.files import atomic_directory, verify_manifest, write_manifest
from tests.rlhf_critic.checkpoint.saved_critics import save


@pytest.mark.parametrize("fixture", ["tiny_model", "tied_model"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saving_and_loading_changes_nothing(request, tmp_path, fixture, dtype):
    source = request.getfixturevalue(fixture)
    first = load_critic(save(source, tmp_path / "first", dtype))
    save_critic(tmp_path / "second", first.critic, first.encoder, first.card)
    second = load_critic(tmp_path / "second")
    assert second.card == first.card
    assert second.encoder.fingerprint == first.encoder.fingerprint
    for name, tensor in first.critic.state_dict().items():
        assert torch.equal(second.critic.state_dict()[name], tensor), name
    files = {path.name for path in (tmp_path / "second").iterdir()}
    assert files == {path.name for path in (tmp_path / "first").iterdir()}
    assert (tmp_path / "first" / "config.json").read_text() == (tmp_path / "second" / "config.json").read_text()
    assert not any(name.endswith((".bin", ".pt")) for name in files)


def test_an_export_loads_here_too_and_leaves_the_resume_state_behind(tiny_model, tmp_path):
    saved = save(tiny_model, tmp_path / "saved")
    (saved / "resume").mkdir()
    (saved / "resume" / "state.pt").write_bytes(b"pickle")
    write_manifest(saved, 0, 1)
    export_critic(saved, tmp_path / "export", auto_map=True)
    assert not (tmp_path / "export" / "resume").exists()
    verify_manifest(tmp_path / "export")
    again = load_critic(tmp_path / "export")
    save_critic(tmp_path / "again", again.critic, again.encoder, again.card)
    assert "auto_map" not in json.loads((tmp_path / "again" / "config.json").read_text())
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "again").config.num_labels == 1


def test_an_export_is_whole_or_absent(tiny_model, tmp_path):
    saved = save(tiny_model, tmp_path / "saved")
    (tmp_path / "there").mkdir()
    with pytest.raises(CheckpointError, match="exists already"):
        export_critic(saved, tmp_path / "there", auto_map=False)
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, "model_type": "mpt"}))
    with pytest.raises(CheckpointError, match="no auto_map modeling file for model type 'mpt'"):
        export_critic(saved, tmp_path / "absent", auto_map=True)
    assert {path.name for path in tmp_path.iterdir()} == {"saved", "there"}
    with pytest.raises(RuntimeError, match="half way"), atomic_directory(tmp_path / "absent") as building:
        (building / "file").write_text("half")
        raise RuntimeError("half way")
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(CheckpointError, match="could not be written"), atomic_directory(tmp_path / "file" / "absent"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"saved", "there", "file"}


def test_an_export_of_a_damaged_export_is_refused(tiny_model, tmp_path):
    """New checksums would hide the damage."""
    export_critic(save(tiny_model, tmp_path / "saved"), tmp_path / "export", auto_map=False)
    flip_a_bit(tmp_path / "export")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged"):
        export_critic(tmp_path / "export", tmp_path / "again", auto_map=False)
    assert not (tmp_path / "again").exists()


def cut_weights(directory: Path) -> None:
    path = directory / "model.safetensors"
    os.truncate(path, path.stat().st_size - 7)


def flip_a_bit(directory: Path) -> None:
    path = directory / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def lose_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()


def change_the_manifest(directory: Path) -> None:
    path = directory / "manifest-1-of-2.json"
    path.write_text(path.read_text()[:-5])


def lose_manifest(directory: Path) -> None:
    (directory / "manifest-0-of-2.json").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_weights, r"model\.safetensors: damaged"),
        (flip_a_bit, r"model\.safetensors: damaged"),
        (lose_weights, r"model\.safetensors: missing"),
        (change_the_manifest, r"manifest-1-of-2\.json: damaged"),
        (lose_manifest, "1 of 2 manifests"),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_refused(tiny_model, tmp_path, damage, message):
    saved = save(tiny_model, tmp_path / "saved")
    write_manifest(saved, 0, 2)
    write_manifest(saved, 1, 2)
    verify_manifest(saved)
    damage(saved)
    with pytest.raises(CheckpointError, match=message):
        verify_manifest(saved)


@pytest.mark.parametrize("use", [load_critic, check_critic])
def test_a_critic_that_was_damaged_is_no_critic_and_what_only_a_resumed_run_reads_may_be(tiny_model, tmp_path, use):
    saved = save(tiny_model, tmp_path / "saved")
    (saved / "resume").mkdir()
    (saved / "resume" / "state.pt").write_bytes(b"pickle")
    write_manifest(saved, 0, 1)
    (saved / "resume" / "state.pt").unlink()
    use(saved)
    flip_a_bit(saved)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged"):
        use(saved)


def test_a_manifest_may_leave_to_others_what_they_recorded(tmp_path):
    (tmp_path / "part").mkdir()
    for path in (tmp_path / "part" / "weights", tmp_path / "state"):
        path.write_text("whole")
    write_manifest(tmp_path, 0, 1, "state")
    (tmp_path / "part" / "weights").write_text("damaged")
    verify_manifest(tmp_path)
    (tmp_path / "state").write_text("broken")
    with pytest.raises(CheckpointError, match="state: damaged"):
        verify_manifest(tmp_path)


def test_without_a_manifest_nothing_is_whole(tmp_path):
    with pytest.raises(CheckpointError, match="0 of 1 manifests"):
        verify_manifest(tmp_path)


def change_the_template(directory: Path) -> None:
    path = directory / "chat_template.jinja"
    path.write_text(path.read_text() + " ")


def change_the_limit(directory: Path) -> None:
    card = json.loads((directory / CARD_NAME).read_text())
    card["encoder"]["max_length"] += 1
    (directory / CARD_NAME).write_text(json.dumps(card))


def drop_the_card(directory: Path) -> None:
    (directory / CARD_NAME).unlink()


def break_the_card(directory: Path) -> None:
    (directory / CARD_NAME).write_text("{")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_the_template, "not the one this critic was trained with"),
        (change_the_limit, "not the one this critic was trained with"),
        (drop_the_card, "not a critic directory, or writing it was interrupted"),
        (break_the_card, "not a valid critic card"),
        (cut_weights, "damaged"),
    ],
)
def test_a_critic_that_would_score_differently_is_refused(tiny_model, tmp_path, change, message):
    saved = save(tiny_model, tmp_path / "saved")
    change(saved)
    with pytest.raises(CheckpointError, match=message):
        load_critic(saved)


def test_a_model_without_the_encoders_pad_token_is_not_saved(tiny_model, tmp_path):
    loaded = load_critic(save(tiny_model, tmp_path / "saved"))
    loaded.critic.model.config.pad_token_id = 1
    with pytest.raises(CheckpointError, match="pad_token_id is 1"):
        save_critic(tmp_path / "other", loaded.critic, loaded.encoder, loaded.card)


def test_a_critic_with_a_bias_in_its_head_is_not_saved(tiny_model, tmp_path):
    """A reward model of another system may have one in memory. Its file would give other rewards."""
    loaded = load_critic(save(tiny_model, tmp_path / "saved"))
    loaded.critic.model.score.bias = 0.375
    with pytest.raises(CheckpointError, match=r"a bias of 0\.375.*--head-bias reward-mean"):
        save_critic(tmp_path / "other", loaded.critic, loaded.encoder, loaded.card)
    assert not (tmp_path / "other").exists()


def test_a_card_of_an_older_format_is_read_and_one_of_a_newer_format_is_an_error(tiny_model, tmp_path, monkeypatch):
    path = save(tiny_model, tmp_path / "saved") / CARD_NAME
    card = json.loads(path.read_text())
    assert card["format_version"] == critic_directory.FORMAT_VERSION
    monkeypatch.setattr(critic_directory, "FORMAT_VERSION", card["format_version"] + 1)
    assert critic_directory.read_card(path.parent).version == card["version"]
    monkeypatch.undo()
    path.write_text(json.dumps({**card, "format_version": 7, "key_of_the_future": 1}))
    newer = r"critic\.json: written by a newer version of rlhf-critic \(format 7, this version reads up to 3\): upgrade"
    with pytest.raises(CheckpointError, match=newer):
        critic_directory.read_card(path.parent)
    for changes in ({"key_of_the_future": 1}, {"format_version": 0}, {"format_version": "new"}):
        path.write_text(json.dumps({**card, **changes}))
        with pytest.raises(CheckpointError, match=f"not a valid critic card(.|\n)*{next(iter(changes))}"):
            critic_directory.read_card(path.parent)
