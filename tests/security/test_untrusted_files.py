"""An untrusted directory may be rejected, but it never runs code here: no pickle, no modeling file."""

import ast
import io
import json
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from actors.serving import control
from actors.serving.scorer import Scorer
from jobs import evaluate, export, inspect_data, train
from rlhf_critic.checkpoint.critic_directory import load_critic
from rlhf_critic.config.serve import ScorerConfig, ServeJobConfig
from rlhf_critic.config.train import TrainJobConfig
from rlhf_critic.data.encoding import load_tokenizer
from rlhf_critic.errors import CheckpointError, CriticError
from rlhf_critic.model.factory import create_critic_model
from tests.jobs.command_line import run

REPOSITORY = Path(__file__).parents[2]
AUTO_CLASSES = ("AutoConfig", "AutoModel", "AutoModelForSequenceClassification", "AutoModelForCausalLM")


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "executed"


def only_a_bin(critic, payload):
    torch.save(payload, critic / "pytorch_model.bin")
    (critic / "model.safetensors").unlink()


def only_a_harmless_bin(critic, payload):
    torch.save(load_file(critic / "model.safetensors"), critic / "pytorch_model.bin")
    (critic / "model.safetensors").unlink()


def a_bin_under_a_safetensors_name(critic, payload):
    torch.save(payload, critic / "model.safetensors")


def a_bare_pickle_under_a_safetensors_name(critic, payload):
    (critic / "model.safetensors").write_bytes(pickle.dumps(payload))


def an_index_that_names_a_bin(critic, payload):
    torch.save(payload, critic / "model.bin")
    (critic / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(["score.weight"], "model.bin")}
    (critic / "model.safetensors.index.json").write_text(json.dumps(index))


def an_index_that_names_a_harmless_bin(critic, payload):
    weights = load_file(critic / "model.safetensors")
    an_index_that_names_a_bin(critic, weights)
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "model.bin")}
    (critic / "model.safetensors.index.json").write_text(json.dumps(index))


DISGUISES = [
    (only_a_bin, "safetensors (only|files)"),
    (only_a_harmless_bin, "safetensors (only|files)"),
    (a_bin_under_a_safetensors_name, "damaged, or not a weights file"),
    (a_bare_pickle_under_a_safetensors_name, "damaged, or not a weights file"),
    (an_index_that_names_a_bin, "safetensors (only|files)"),
    (an_index_that_names_a_harmless_bin, "safetensors (only|files)"),
]


@pytest.mark.parametrize(("disguise", "message"), DISGUISES)
def test_scorers_refuse_a_pickle_and_do_not_run_it(disguise, message, critics, tmp_path, marker):
    critic = shutil.copytree(critics["first"], tmp_path / "critic")
    payload = {"score.weight": Payload(marker)}
    disguise(critic, payload)
    ways = {
        "jobs.serve, started or published to": lambda: control.checked(ServeJobConfig(checkpoint="-"), str(critic)),
        "a replica": lambda: Scorer(ScorerConfig(checkpoint=str(critic))),
        "the library": lambda: load_critic(critic),
    }
    for way, load in ways.items():
        with pytest.raises(CheckpointError, match=message):
            load()
        assert not marker.exists(), way
    pickle.loads(pickle.dumps(payload))
    assert marker.exists(), "a payload that does nothing proves nothing"


def download_code(directory, marker, model_type=None):
    """Adds code for every class that transformers loads to a model directory; with ``model_type``, it is required."""
    (directory / "brought.py").write_text(f"from pathlib import Path\nPath({str(marker)!r}).touch()\n")
    config = json.loads((directory / "config.json").read_text())
    classes = {name: f"brought.Brought{name}" for name in AUTO_CLASSES}
    changed = {**config, "auto_map": classes, "model_type": model_type or config["model_type"]}
    (directory / "config.json").write_text(json.dumps(changed))
    path = directory / "tokenizer_config.json"
    tokenizer = json.loads(path.read_text())
    path.write_text(json.dumps({**tokenizer, "auto_map": {"AutoTokenizer": [None, "brought.BroughtTokenizer"]}}))


@pytest.fixture
def says_yes(monkeypatch):
    """Simulates a terminal, or ``yes |``, that answers every question with yes."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))


def build(model, critic, data, out):
    return lambda: create_critic_model(model, load_tokenizer(model), None)


def load(model, critic, data, out):
    return lambda: load_critic(critic)


def score(model, critic, data, out):
    return lambda: Scorer(ScorerConfig(checkpoint=critic))


def of_command(command, *arguments):
    def prepare(model, critic, data, out):
        known = {"MODEL": model, "CRITIC": critic, "DATA": data, "OUT": out}
        return command.main, [known.get(argument, argument) for argument in arguments]

    return prepare


WAYS = {
    "create_critic_model": build,
    "load_critic": load,
    "a scorer": score,
    "jobs.inspect_data": of_command(inspect_data, "DATA", "--model", "MODEL", "--cache-dir", "OUT"),
    "jobs.train": of_command(
        train, "--dry-run", "--model.path", "MODEL", "--data.train", "DATA", "--data.cache-dir", "OUT"
    ),
    "jobs.evaluate": of_command(evaluate, "CRITIC", "DATA", "--cache-dir", "OUT"),
    "jobs.export of a critic": of_command(export, "CRITIC", "OUT"),
    "jobs.export of a foreign model": of_command(export, "MODEL", "OUT", "--from", "native"),
}


@pytest.mark.parametrize("known_type", [True, False], ids=["could do without", "cannot do without"])
@pytest.mark.parametrize("way", WAYS)
def test_code_that_comes_with_a_model_is_not_run(
    way, known_type, critics, preference_file, tmp_path, marker, says_yes, monkeypatch, capsys
):
    critic = shutil.copytree(critics["first"], tmp_path / "critic")
    model = shutil.copytree(critic, tmp_path / "model")
    (model / "critic.json").unlink()
    for directory in (critic, model):
        download_code(directory, marker, None if known_type else "brought")
    prepared = WAYS[way](str(model), str(critic), preference_file, str(tmp_path / "out"))
    if isinstance(prepared, tuple):
        code, _, message = run(*prepared, monkeypatch, capsys)
        assert code in ({0} if known_type else {0, 2}), message  # copying a directory needs no model
    elif known_type:
        prepared()
    else:
        with pytest.raises(CriticError):
            prepared()
    assert not marker.exists()


@pytest.mark.slow
def test_training_workers_do_not_run_it_either(critics, preference_file, ray_address, tmp_path, marker):
    model = shutil.copytree(critics["first"], tmp_path / "model")
    download_code(model, marker)
    options = {
        "model": {"path": str(model)},
        "encoding": {"max_length": 64},
        "data": {"train": preference_file, "cache_dir": str(tmp_path / "cache")},
        "train": {"max_steps": 1, "global_batch_size": 2, "token_budget": 300},
        "run": {"storage_path": str(tmp_path / "runs")},
    }
    assert train.train(TrainJobConfig.model_validate(options)).return_value.steps == 1
    checkpoint = tmp_path / "runs" / "critic" / "step-000001"
    assert not marker.exists()
    assert "auto_map" not in (checkpoint / "config.json").read_text()
    assert not list(checkpoint.rglob("brought.py"))


def calls_of(tree):
    """Yields every call in a module as (line, called expression, keyword arguments)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield node.lineno, ast.unparse(node.func), {one.arg: one.value for one in node.keywords if one.arg}


def test_no_source_trusts_remote_code():
    """Only users can trust a modeling file: by loading an export that has one with transformers."""
    loads = trusts = 0
    for path in [path for part in ("rlhf_critic", "actors", "jobs") for path in (REPOSITORY / part).rglob("*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for line, called, keywords in calls_of(tree):
            trust = keywords.get("trust_remote_code")
            place = f"{path.relative_to(REPOSITORY)}:{line}"
            assert trust is None or ast.unparse(trust) == "False", place
            # The library and actors load files from anywhere; these two jobs load files made by this project.
            if called.startswith("Auto") and called.endswith(".from_pretrained"):
                loads += 1
                trusts += trust is None
                assert trust is not None or path.stem in {"quickstart_data", "score_with_transformers"}, place
        keys = [key for node in ast.walk(tree) if isinstance(node, ast.Dict) for key in node.keys if key]
        assert "'trust_remote_code'" not in map(ast.unparse, keys), path
    assert loads > trusts > 0, "the calls are not where this looks"
