"""Bad input ends a command with its exit code, a message that names the fault, and nothing half-written."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BertConfig, MptConfig, MptForCausalLM, T5Config

from jobs import evaluate, export, inspect_data, train
from jobs.cli import EXIT_REFUSED
from rlhf_critic.checkpoint.critic_directory import load_critic
from rlhf_critic.errors import CheckpointError
from tests.helpers import run_command
from tests.jobs.command_line import run
from tests.rlhf_critic.checkpoint.saved_critics import save

GOOD = {"prompt": "please", "chosen": "of course", "rejected": "no"}


DATA = {
    "a missing file": ("nowhere.jsonl", None, "nowhere.jsonl: cannot be read", "check the path"),
    "an empty file": ("empty.jsonl", b"", "empty.jsonl: has no rows", "give a source"),
    "broken JSON": ("broken.jsonl", b'{"prompt": "a", ', "broken.jsonl:2: not JSON", "fix or remove this line"),
    "a missing field": (
        "field.jsonl",
        b'{"prompt": "a", "chosen": "b"}',
        "field.jsonl:2: field 'rejected'",
        "--data.fields",
    ),
    "a text that is none": (
        "type.jsonl",
        json.dumps({**GOOD, "chosen": 3}).encode(),
        "type.jsonl:2: field 'chosen",
        "fix or remove this row",
    ),
    "an empty response": (
        "void.jsonl",
        json.dumps({**GOOD, "rejected": ""}).encode(),
        "void.jsonl:2: field 'rejected",
        "fix or remove this row",
    ),
    "not UTF-8": ("latin.jsonl", b'{"prompt": "\xe9"}', "latin.jsonl:2: not UTF-8", "save it as UTF-8"),
    "a margin that is NaN": (
        "nan.jsonl",
        json.dumps({**GOOD, "margin": float("nan")}).encode(),
        "field 'margin'",
        "fix or remove this row",
    ),
    "an infinite margin": (
        "inf.jsonl",
        json.dumps({**GOOD, "margin": float("inf")}).encode(),
        "field 'margin'",
        "fix or remove this row",
    ),
    "roles that the template refuses": (
        "roles.jsonl",
        json.dumps({**GOOD, "prompt": [{"role": "wizard", "content": "a"}]}).encode(),
        "roles.jsonl:2: field 'chosen': the chat template failed on the roles ['wizard', 'assistant']",
        "only user and assistant",
    ),
    "half of a surrogate pair": (
        "half.jsonl",
        json.dumps({**GOOD, "rejected": [{"role": "assistant", "content": "cut \ud83d"}]}).encode(),
        "half.jsonl:2: field 'rejected': half of a surrogate pair",
        "surrogates not allowed",
    ),
    "a hub id without network": ("nobody/nothing", None, "nobody/nothing: no such file", "download it"),
    "an unknown kind of file": ("notes.txt", b"a", "notes.txt: unknown kind of source", ".jsonl, .json"),
}
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] not in ['user', 'assistant'] %}"
    "{{ raise_exception('only user and assistant') }}{% endif %}{{ message['content'] }}{% endfor %}{{ eos_token }}"
)


@pytest.mark.parametrize("what", DATA)
def test_bad_data(what, tiny_model, tmp_path, monkeypatch, capsys):
    name, second_line, at_fault, advice = DATA[what]
    monkeypatch.chdir(tmp_path)
    if second_line is not None:
        first = b"" if "empty" in what and not second_line else json.dumps(GOOD).encode() + b"\n"
        Path(name).write_bytes(first + second_line)
    Path("template.jinja").write_text(TEMPLATE)
    arguments = [name, "--model", tiny_model, "--encoding.chat-template", "template.jinja"]
    code, output, message = run(inspect_data.main, arguments, monkeypatch, capsys)
    assert code == EXIT_REFUSED
    assert at_fault in message
    assert advice in message
    assert message.count("\n") <= 3, "a message, not a traceback"
    assert not output
    assert not list(Path(".cache").rglob("*.arrow"))


def test_nothing_left_of_long_pairs(tiny_model, tmp_path, monkeypatch, capsys):
    (tmp_path / "long.jsonl").write_text(json.dumps({**GOOD, "chosen": "glad " * 50}))
    arguments = [
        str(tmp_path / "long.jsonl"),
        "--model",
        tiny_model,
        "--encoding.max-length",
        "9",
        "--overlong",
        "skip",
    ]
    code, _, message = run(inspect_data.main, [*arguments, "--cache-dir", str(tmp_path)], monkeypatch, capsys)
    assert code == EXIT_REFUSED
    assert "long.jsonl: no row is left of 1: 1 are longer" in message
    assert "raise the limit" in message


OPTIONS = {
    "an unknown option": (["--train.learning-rat", "1"], "learning-rat"),
    "an unknown value": (["--train.schedule", "stepwise"], "cosine"),
    "a number out of range": (["--train.learning-rate", "-1"], "greater than 0"),
    "ZeRO stage 4": (["--train.zero-stage", "4"], "invalid choice '4'"),
    "no model": (["--data.train", "x.jsonl"], "give --model.path VALUE"),
    "no data": (["--model.path", "x"], "give --data.train VALUE"),
    "two ways to validate": (
        ["--data.validation", "v.jsonl", "--data.validation-fraction", "0.1"],
        "exclude each other; give one of them",
    ),
    "weights for other sources": (["--data.train", "a.jsonl", "--data.train-weights", "1", "2"], "one weight for each"),
    "a seed twice": (["--seeds", "0", "0"], "names a seed twice"),
    "a source twice": (["--data.train", "a.jsonl", "a.jsonl"], "names a source twice"),
    "a config file that is not there": (["--config", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
}


@pytest.mark.parametrize("what", OPTIONS)
def test_bad_options(what, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments, expected = OPTIONS[what]
    code, _, message = run(train.main, arguments, monkeypatch, capsys)
    assert code == EXIT_REFUSED
    assert expected in " ".join(message.replace("│", " ").split())
    assert not list(tmp_path.iterdir())


def no_config(model: Path) -> None:
    (model / "config.json").unlink()


def no_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()


def cut_weights(model: Path) -> None:
    os.truncate(model / "model.safetensors", 1000)


def other_shape(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "intermediate_size": 72}))


def integer_for_a_number(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1}))


def quantised(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    save_file({**weights, name: weights[name].to(torch.float8_e4m3fn)}, model / "model.safetensors")


def adapters_only(model: Path) -> None:
    no_weights(model)
    (model / "adapter_config.json").write_text("{}")


def adapters_without_config(model: Path) -> None:
    adapters_only(model)
    no_config(model)


def encoder(model: Path) -> None:
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    BertConfig(vocab_size=4096, **shape).save_pretrained(model)


def encoder_and_decoder(model: Path) -> None:
    T5Config(vocab_size=4096, d_model=32, d_ff=64, num_layers=2, num_heads=4, d_kv=8).save_pretrained(model)


def no_tokenizer(model: Path) -> None:
    for path in model.glob("tokenizer*"):
        path.unlink()


MODELS = {
    "no config": (no_config, "no model config could be loaded"),
    "no weights": (no_weights, "no weights"),
    "weights cut short": (cut_weights, "damaged, or not a weights file"),
    "weights of another shape": (other_shape, "shape: model.layers.0.mlp.down_proj.weight: (32, 64) in the file"),
    "no tokenizer": (no_tokenizer, "no tokenizer could be loaded"),
    "an integer for a number": (integer_for_a_number, "Validation error for field 'rms_norm_eps'"),
    "quantised weights": (quantised, "quantised: 1 tensors are float8_e4m3fn, such as model.layers.0.mlp.down_proj"),
    "adapters of peft": (adapters_only, "has adapters of peft and no complete model"),
    "adapters of peft without a config": (adapters_without_config, "rlhf-critic export ADAPTERS OUT --base BASE_MODEL"),
    "an encoder": (encoder, "BertForSequenceClassification (model type 'bert') has no 'score' head"),
    "an encoder and a decoder": (encoder_and_decoder, "T5ForSequenceClassification (model type 't5') has no 'score'"),
}


def test_commands_on_what_is_no_critic(tiny_model, tmp_path, monkeypatch, capsys):
    (tmp_path / "data.jsonl").write_text(json.dumps(GOOD))
    out = tmp_path / "out"
    for main, arguments in (
        (export.main, [tiny_model, str(out)]),
        (evaluate.main, [tiny_model, str(tmp_path / "data.jsonl")]),
    ):
        code, _, message = run(main, arguments, monkeypatch, capsys)
        assert code == EXIT_REFUSED
        assert "no critic.json: not a critic directory" in message
    assert not out.exists()
    assert not list(tmp_path.glob(".out-*"))


EXPORTS = {
    "a base model": ({}, [], "(lm_head.*, model.*) do not match --from auto", "rlhf-critic train"),
    "a format it has not": (
        {},
        ["--from", "trlx"],
        "(lm_head.*, model.*) do not match --from trlx",
        "another --from",
    ),
    "an unknown format": ({}, ["--from", "coati"], "invalid choice 'coati'", "deepspeed-chat"),
    "a head bias": ({"value_head.bias": 0.5}, [], "the head has a bias of 0.5", "--head-bias reward-mean"),
    "no tokenizer": (
        {"value_head.bias": 0.0, "tokenizer_config.json": None},
        [],
        "no tokenizer_config.json",
        "give the model it was trained from, --base BASE_MODEL",
    ),
}


@pytest.mark.parametrize("what", EXPORTS)
def test_bad_exports(what, tiny_model, tmp_path, monkeypatch, capsys):
    changes, options, at_fault, advice = EXPORTS[what]
    source = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    if changes:
        weights = load_file(source / "model.safetensors")
        weights["value_head.weight"] = torch.ones(1, 32)
        weights["value_head.bias"] = torch.tensor([changes["value_head.bias"]])
        save_file(weights, source / "model.safetensors")
    if "tokenizer_config.json" in changes:
        (source / "tokenizer_config.json").unlink()
    code, output, message = run(export.main, [str(source), str(tmp_path / "out"), *options], monkeypatch, capsys)
    assert code == EXIT_REFUSED
    assert at_fault in " ".join(message.replace("│", " ").split())
    assert advice in message
    assert not output
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_relative_path_is_a_directory_or_told(tiny_model, tmp_path, monkeypatch, capsys):
    save(tiny_model, tmp_path / "critic")
    monkeypatch.chdir(tmp_path)
    code, _, message = run(export.main, ["critik", "out"], monkeypatch, capsys)
    assert code == EXIT_REFUSED
    assert "critik: no such directory; check the path" in message
    code, output, _ = run(export.main, ["critic", "out"], monkeypatch, capsys)
    assert code == 0
    assert 'from_pretrained("out")' in output
    load_critic(tmp_path / "out")
    code, _, _ = run(export.main, [f"file://{tmp_path}/critic", "of-uri"], monkeypatch, capsys)
    assert code == 0
    load_critic(tmp_path / "of-uri")


def test_an_option_that_a_critic_leaves_no_choice_of(tiny_model, tmp_path, monkeypatch, capsys):
    critic = save(tiny_model, tmp_path / "critic")
    arguments = [str(critic), str(tmp_path / "out"), "--max-length", "9"]
    code, _, message = run(export.main, arguments, monkeypatch, capsys)
    assert code == EXIT_REFUSED
    assert "--max-length is for another system's checkpoint" in message
    assert "leave the option out" in message
    assert not (tmp_path / "out").exists()


FULL_DISK = """
import resource, sys
from jobs import export
from jobs.cli import run_job
from rlhf_critic.checkpoint.critic_directory import load_critic, save_critic

checkpoint, second = sys.argv[1], sys.argv.pop()
loaded = load_critic(checkpoint)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    save_critic(second, loaded.critic, loaded.encoder, loaded.card)
except Exception as error:
    print(type(error).__name__, error)
run_job(export.main)
"""


def test_a_disk_that_is_full_leaves_the_checkpoint_before_usable(tiny_model, tmp_path):
    first, second, out = tmp_path / "first", tmp_path / "second", tmp_path / "out"
    save(tiny_model, first)
    finished = run_command(["-c", FULL_DISK, str(first), str(out), str(second)], cwd=Path())
    assert "File too large" in finished.stdout, finished.stdout + finished.stderr
    assert finished.returncode == EXIT_REFUSED
    assert f"error: {out}: could not be written" in finished.stderr
    assert "Free some space" in finished.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"first", "second"}
    with pytest.raises(CheckpointError, match="writing it was interrupted"):
        load_critic(second)
    load_critic(first)


def more_tokens(model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["one more", "and another"])
    tokenizer.save_pretrained(model)


MODELS["a tokenizer bigger than the embedding"] = (more_tokens, "bigger than the embedding")


@pytest.mark.parametrize("what", MODELS)
def test_bad_models(what, tiny_model, tmp_path, monkeypatch, capsys):
    break_it, expected = MODELS[what]
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    break_it(model)
    (tmp_path / "data.jsonl").write_text(json.dumps(GOOD))
    arguments = ["--model.path", str(model), "--data.train", str(tmp_path / "data.jsonl"), "--dry-run"]
    monkeypatch.chdir(tmp_path)
    code, output, message = run(train.main, arguments, monkeypatch, capsys)
    assert code == EXIT_REFUSED
    assert expected in message
    assert str(model) in message
    assert "plan" not in output
    assert not (tmp_path / "runs").exists()


def test_mpt_whose_config_takes_integers_only_for_dropout(tiny_model, tmp_path, monkeypatch, capsys):
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    rows = len(AutoTokenizer.from_pretrained(tiny_model))
    MptForCausalLM(MptConfig(vocab_size=rows, d_model=32, n_heads=4, n_layers=2)).save_pretrained(model)
    (tmp_path / "data.jsonl").write_text(json.dumps(GOOD))
    arguments = ["--model.path", str(model), "--data.train", str(tmp_path / "data.jsonl"), "--dry-run"]
    monkeypatch.chdir(tmp_path)
    code, output, message = run(train.main, arguments, monkeypatch, capsys)
    assert code == 0, message
    assert "plan of critic" in output


def test_texts_longer_than_a_model_was_made_for_are_warned_of(tiny_model, tmp_path, monkeypatch, capsys):
    (tmp_path / "data.jsonl").write_text(json.dumps(GOOD))
    arguments = ["--model.path", tiny_model, "--data.train", str(tmp_path / "data.jsonl"), "--dry-run"]
    monkeypatch.chdir(tmp_path)
    for length, is_told in (("512", False), ("513", True)):
        code, _, message = run(train.main, [*arguments, "--encoding.max-length", length], monkeypatch, capsys)
        assert code == 0
        assert (f"encoding.max_length={length} is above the 512 positions" in message) == is_told
