"""Plain transformers computes the rewards of every family's export, with the family's class and the shipped one."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from rlhf_critic.checkpoint import auto_map
from rlhf_critic.checkpoint.critic_directory import load_critic
from rlhf_critic.checkpoint.export import export_critic
from rlhf_critic.model.backbone import PADDED_FAMILIES
from rlhf_critic.model.prefix_attention import PREFIX_TREE_FAMILIES
from rlhf_critic.scoring.local import score_sequences
from tests.helpers import make_preferences, run_command
from tests.rlhf_critic.checkpoint.saved_critics import save
from tests.rlhf_critic.families import save_base_model

NAMES = sorted(auto_map.AUTO_MAP_FAMILIES)
WAYS = [
    f"{kind}_{way}"
    for kind in ("native", "auto_map")
    for way in ("alone", "right", "left", "pipeline", "pipeline_batched")
]
# The family's own class counts the positions of a left-padded row from its first column, padding included.
SHIFTED_BY_LEFT_PADDING = {"gpt2"}


def pairs() -> list[tuple[str, str]]:
    """Returns texts from one token to far beyond the limit; one contains the EOS token as text."""
    made = [(row["prompt"], row[side]) for row in make_preferences(3, seed=5) for side in ("chosen", "rejected")]
    return [*made, ("", ""), ("please " * 60, "thank you"), ("explain", "of course</s>")]


@pytest.fixture(scope="module")
def exports(tiny_model, tied_model, tmp_path_factory) -> dict[str, Path]:
    """Exports a critic of every family, and of Llama also with a chat template, tied and untied."""
    directory = tmp_path_factory.mktemp("exports")
    sources = {name: save_base_model(name, directory / f"{name}-base") for name in NAMES}
    made = {}
    for name, source in {**sources, "llama, untied": tiny_model, "llama, tied": tied_model}.items():
        saved = save(source, directory / f"{name}-saved")
        export_critic(saved, directory / name, auto_map=True)
        made[name] = directory / name
    return made


@pytest.fixture(scope="module")
def plain(exports, tmp_path_factory) -> dict[str, dict]:
    """What a process that cannot import this project says of them."""
    directory = tmp_path_factory.mktemp("plain")
    (directory / "pairs.json").write_text(json.dumps(pairs()))
    script = Path(__file__).with_name("plain_scores.py")
    finished = run_command(
        [str(script), str(directory / "pairs.json"), *map(str, exports.values())],
        cwd=directory,
        env={"HF_MODULES_CACHE": str(directory / "modules")},
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return dict(zip(exports, json.loads(finished.stdout.splitlines()[-1]), strict=True))


def test_every_modeling_file_is_that_of_a_tested_family():
    assert set(auto_map.AUTO_MAP_FAMILIES) <= PREFIX_TREE_FAMILIES | PADDED_FAMILIES


@pytest.mark.parametrize("name", [*NAMES, "llama, untied", "llama, tied"])
def test_plain_transformers_scores_an_export_the_same(exports, plain, name):
    loaded = load_critic(exports[name])
    encoded = loaded.encoder.encode_batch(pairs())
    assert any(one.truncated for one in encoded)
    expected = score_sequences(loaded.critic, [one.ids for one in encoded], 200)
    assert np.ptp(expected) > 0.01
    scores = plain[name]
    family = auto_map.AUTO_MAP_FAMILIES[name.split(",")[0]][0]
    assert scores["native_class"] == f"{family}ForSequenceClassification"
    assert scores["auto_map_class"] == f"{family}RewardModel"
    for way in WAYS:
        if way == "native_left" and name in SHIFTED_BY_LEFT_PADDING:
            assert np.abs(np.subtract(scores[way], expected)).max() > 1e-3, "no longer so: README says that it is"
            continue
        np.testing.assert_allclose(scores[way], expected, rtol=0, atol=1e-5, err_msg=way)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_the_shipped_class_gives_the_critics_value_at_every_token(exports, plain, name):
    loaded = load_critic(exports[name])
    for row, encoded in enumerate(loaded.encoder.encode_batch(pairs())):
        expected = loaded.critic.values(loaded.critic.batch_of([encoded.ids]))[0]
        assert len(expected) == len(encoded.ids)
        for way in ("values_alone", "values_right", "values_left"):
            np.testing.assert_allclose(plain[name][way][row], expected, rtol=0, atol=1e-5, err_msg=f"{way}, row {row}")


@pytest.mark.parametrize("name", NAMES)
def test_the_shipped_class_can_be_trained_on(plain, name):
    """With gradient checkpointing, it has the same gradients as the family's own class without it."""
    scores = plain[name]
    assert scores["largest_gradient"] > 1e-2
    assert scores["gradient_error"] < 1e-5 * max(1, scores["largest_gradient"])
    assert scores["head_calls"] == 1  # called as a module, so that adapters can wrap it
    assert scores["output_keys"] == ["logits", "token_values"]
    assert scores["output_shapes"] == [[2, 1], scores["batch_shape"]]
    assert scores["regression_loss"] == pytest.approx(scores["regression_target"], rel=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_file_is_plain_python_of_its_own_family(name, tmp_path):
    source = auto_map.reward_model_source(name)
    family, backbone = auto_map.AUTO_MAP_FAMILIES[name]
    assert ("Llama" in source) == (name == "llama")
    assert f"self.{backbone} = {family}Model(config)" in source
    assert ("position_ids" in source) == (name != "bloom")
    assert ("word_embed_proj_dim" in source) == (name == "opt")
    path = tmp_path / f"modeling_{name}_reward.py"
    path.write_text(source)
    config = str(Path(__file__).parents[3] / "pyproject.toml")
    for command in (["check"], ["format", "--check"]):
        checked = run_command(["-m", "ruff", *command, "--no-cache", "--config", config, str(path)], cwd=tmp_path)
        assert checked.returncode == 0, checked.stdout
