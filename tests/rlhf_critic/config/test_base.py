"""Options come from a file and the command line, which overrides the file; an error names option and line."""

import pytest

from rlhf_critic.config import base
from rlhf_critic.config.base import parse_command_line
from rlhf_critic.config.ppo import PPOJobConfig
from rlhf_critic.config.train import RunConfig, TrainJobConfig
from rlhf_critic.errors import ConfigError

FILE = """\
model:
  path: somewhere
train:
  learning_rate: 3.0e-5
  zero_stage: 3
"""


def test_the_command_line_wins_over_the_file(tmp_path):
    (tmp_path / "c.yaml").write_text(FILE)
    for form in (["--config", str(tmp_path / "c.yaml")], [f"--config={tmp_path / 'c.yaml'}"]):
        config = parse_command_line(TrainJobConfig, [*form, "--train.learning-rate", "1e-4", "--model.num-layers", "3"])
        assert (config.model.path, config.model.num_layers) == ("somewhere", 3)
        assert (config.train.learning_rate, config.train.zero_stage) == (1e-4, 3)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("learning_rate: 3.0e-5", "learning_rate: -1", r"c.yaml:4: train.learning_rate: .*greater than 0"),
        ("zero_stage: 3", "zero_stage: 4", r"c.yaml:5: train.zero_stage: "),
        ("  path: somewhere", "  pth: somewhere", r"c.yaml:2: model.pth: Extra inputs"),
        ("model:", "modle:", r"c.yaml:1: modle: Extra inputs"),
        ("learning_rate: 3.0e-5", "learning_rate: .nan", r"c.yaml:4: train.learning_rate: .*finite"),
        ("model:", "model: [", r"c.yaml: not a YAML file"),
    ],
)
def test_a_wrong_option_in_a_file_is_named_with_its_line(tmp_path, old, new, message):
    (tmp_path / "c.yaml").write_text(FILE.replace(old, new))
    with pytest.raises(ConfigError, match=message):
        parse_command_line(TrainJobConfig, ["--config", str(tmp_path / "c.yaml")])


@pytest.mark.parametrize("wrong", [["--train.zero-stage", "4"], ["--train.lr", "1"], ["--train.learning-rate", "-1"]])
def test_a_wrong_command_line_exits_with_2(wrong, capsys):
    with pytest.raises(SystemExit) as exited:
        parse_command_line(TrainJobConfig, wrong)
    assert exited.value.code == 2
    assert wrong[0].split(".")[-1].replace("-", "_")[:8] in capsys.readouterr().err.replace("-", "_")


def test_a_byte_order_mark_of_a_file_is_ignored(tmp_path):
    (tmp_path / "c.yaml").write_text("\ufeff" + FILE, encoding="utf-8")
    (tmp_path / "plain.yaml").write_text(FILE, encoding="utf-8")
    marked, plain = (
        parse_command_line(TrainJobConfig, ["--config", str(tmp_path / name)]) for name in ("c.yaml", "plain.yaml")
    )
    assert marked == plain


def test_missing_files_and_required_options(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot be read"):
        parse_command_line(TrainJobConfig, ["--config", str(tmp_path / "nowhere.yaml")])
    with pytest.raises(ConfigError, match=r"model\.path is required: give --model\.path VALUE"):
        parse_command_line(TrainJobConfig, []).validate_complete()


def test_help_gives_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit) as exited:
        parse_command_line(TrainJobConfig, ["--help"], prog="python -m jobs.train")
    assert exited.value.code == 0
    text = capsys.readouterr().out
    for section, model in TrainJobConfig.model_fields.items():
        options = getattr(model.annotation, "model_fields", None)
        for option, field in (options or {}).items():
            assert f"--{section}.{option.replace('_', '-')}" in text
            assert field.description
            shown = "None" if field.default is None else str(field.default)
            if field.default in ((), {}):
                shown = ""
            assert f"(default: {shown})" in " ".join(text.replace("│", " ").split()) or isinstance(field.default, str)


@pytest.mark.parametrize(
    "uri",
    [
        "s3://KEY:hush@bucket/runs",
        "s3://KEY:1/hush@bucket/runs",
        "s3://KEY:ab/hush+@bucket/runs",
        "ftp://me:hush@host/x",
        "s3://bucket/x?secret_key=hush",
    ],
)
def test_a_secret_in_a_uri_is_refused_and_not_repeated(uri, tmp_path):
    """Options are written into critic.json, TensorBoard's and W&B's records and the log."""
    (tmp_path / "c.yaml").write_text(f"data:\n  train: [a.jsonl, '{uri}']\n")
    for arguments in (["--config", str(tmp_path / "c.yaml")], ["--run.storage-path", uri]):
        with pytest.raises(ConfigError, match=r"(train|storage_path): a URI with a password or key") as refused:
            parse_command_line(TrainJobConfig, arguments)
        assert "hush" not in str(refused.value)
    harmless = ["--run.storage-path", "s3://bucket/runs?region=eu", "--data.train", "https://host:443/a@b.jsonl"]
    assert parse_command_line(TrainJobConfig, harmless).run.storage_path == harmless[1]


def test_fewer_workers_than_none_and_more_than_all_are_refused():
    assert RunConfig(num_workers=2, min_workers=2).min_workers == 2
    for fewest in (0, 3):
        with pytest.raises(ValueError, match="min_workers"):
            RunConfig(num_workers=2, min_workers=fewest)


def test_local_paths_become_absolute_and_words_uris_and_hub_ids_stay(tmp_path, monkeypatch):
    """Actors may have another working directory than the driver."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    (tmp_path / "saved").mkdir()
    for name in ("plain", "a.jsonl", "here"):
        (tmp_path / name).touch()

    def train(**sections):
        return TrainJobConfig.model_validate(sections)

    for given, stored in (
        ("owner/name", "owner/name"),
        ("here", f"{tmp_path}/here"),
        ("./missing", f"{tmp_path}/missing"),
        ("~/model", "/home/me/model"),
        ("", ""),
    ):
        assert train(model={"path": given}).model.path == stored
    sources = ["a.jsonl", "saved:test", "owner/name:test", "s3://bucket/a.jsonl", ".cache/not-yet.jsonl", "~/b.csv"]
    expected = (
        *(f"{tmp_path}/a.jsonl", f"{tmp_path}/saved:test", "owner/name:test", "s3://bucket/a.jsonl"),
        *(f"{tmp_path}/.cache/not-yet.jsonl", "/home/me/b.csv"),
    )
    assert train(data={"train": sources}).data.train == expected
    assert PPOJobConfig.model_validate({"prompts": {"train": "a.jsonl"}}).prompts.train == expected[:1]
    assert train(encoding={"chat_template": "plain"}).encoding.chat_template == "plain"
    assert train(encoding={"chat_template": "t.jinja"}).encoding.chat_template == f"{tmp_path}/t.jinja"
    assert train(run={"storage_path": "s3://bucket/runs"}).run.storage_path == "s3://bucket/runs"
    for config in (train(), parse_command_line(TrainJobConfig, []), parse_command_line(PPOJobConfig, [])):
        assert config.run.storage_path == f"{tmp_path}/runs"


@pytest.mark.parametrize("config", [{"data": {"train": ["a", "./a"]}}, {"data": {"validation": ["o/n", "o/n"]}}])
def test_a_source_is_named_once(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").touch()
    with pytest.raises(ValueError, match="names a source twice"):
        TrainJobConfig.model_validate(config)
    with pytest.raises(ValueError, match="names a source twice"):
        PPOJobConfig.model_validate({"prompts": config["data"]})


def test_a_path_is_shown_where_the_working_directory_is_gone(tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    assert base.shown_path(str(gone / "runs")) == "runs"
    gone.rmdir()
    assert base.shown_path(str(gone / "runs")) == str(gone / "runs")
