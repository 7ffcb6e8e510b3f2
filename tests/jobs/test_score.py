"""Offline scoring gives the rewards of training, writes every row once, and resumes after an interruption."""

import datetime
import gzip
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from jobs import score
from jobs.cli import EXIT_REFUSED
from jobs.run_lock import lock_directory
from rlhf_critic.checkpoint.critic_directory import load_critic
from tests.actors.scorers import make_conversations, rewards_by_engine
from tests.helpers import slow_except, wait_until
from tests.jobs.command_line import run

pytestmark = pytest.mark.timeout(300)
TOLERANCE = 1e-5


def write(path, rows):
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return str(path)


def read(out):
    rows = []
    for path in sorted(Path(out).glob("part-*")):
        if path.suffix == ".parquet":
            rows += parquet.read_table(path).to_pylist()
        else:
            rows += [json.loads(line) for line in path.read_text().splitlines()]
    return rows


def rows_of(shape, items, encoder):
    """Returns the same conversations in every supported format."""
    for number, (prompt, response) in enumerate(items):
        if shape == "pairs":
            yield {"id": number, "prompt": prompt, "response": response}
        elif shape == "chats":
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
            yield {"id": number, "messages": turns}
        elif shape == "texts":
            yield {"id": number, "text": encoder.render(prompt, response)}
        elif shape == "ids":
            yield {"id": number, "token_ids": encoder.encode(prompt, response).ids}


@pytest.mark.parametrize(
    ("shape", "name"),
    slow_except(
        [("chats", "a.jsonl.gz")],
        [("pairs", "a.jsonl"), ("chats", "a.jsonl.gz"), ("texts", "a.parquet"), ("ids", "a.jsonl")],
    ),
)
def test_rewards_are_those_of_the_engine(ray_address, critics, tmp_path, monkeypatch, capsys, shape, name):
    items = make_conversations(23)
    wanted = rewards_by_engine(critics["first"], items)
    encoder = load_critic(critics["first"]).encoder
    data = write(tmp_path / name, list(rows_of(shape, items, encoder)))
    out = tmp_path / "out"
    arguments = [critics["first"], data, str(out), "--rows-per-part", "5", "--num-workers", "2"]
    code, _, message = run(score.main, arguments, monkeypatch, capsys)
    assert code == 0, message
    scored = read(out)
    assert [row["id"] for row in scored] == list(range(23))
    np.testing.assert_allclose([row["reward"] for row in scored], wanted, atol=TOLERANCE)
    assert {row["model_version"].split("#")[0] for row in scored} == {"tiny@1"}
    assert {path.suffix for path in out.glob("part-*")} == {".parquet" if name.endswith("parquet") else ".jsonl"}
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["rows"], summary["responses"]) == (23, 23)
    assert summary["reward_mean"] == pytest.approx(wanted.mean(), abs=TOLERANCE)
    assert summary["truncated"] == (0 if shape == "ids" else sum(row["truncated"] for row in scored))


@pytest.mark.slow
def test_best_of_n_and_all_of_n(ray_address, critics, tmp_path, monkeypatch, capsys):
    items = make_conversations(24)
    groups = [
        {"question": items[start].prompt, "responses": [item.response for item in items[start : start + 4]]}
        for start in range(0, 24, 4)
    ]
    groups = [{**group, "note": "only here" if index == 3 else None} for index, group in enumerate(groups)]
    data = write(tmp_path / "groups.parquet", groups)
    pairs = [item._replace(prompt=items[index - index % 4].prompt) for index, item in enumerate(items)]
    wanted = rewards_by_engine(critics["first"], pairs).reshape(6, 4)
    arguments = [critics["first"], data, "--fields", "prompt", "question", "--rows-per-part", "2"]
    assert run(score.main, [*arguments, str(tmp_path / "all")], monkeypatch, capsys)[0] == 0
    np.testing.assert_allclose([row["reward"] for row in read(tmp_path / "all")], wanted, atol=TOLERANCE)
    assert run(score.main, [*arguments, str(tmp_path / "best"), "--best-of-n"], monkeypatch, capsys)[0] == 0
    best = read(tmp_path / "best")
    np.testing.assert_allclose([row["reward"] for row in best], wanted.max(axis=1), atol=TOLERANCE)
    for row, group, rewards in zip(best, groups, wanted, strict=True):
        assert row["response"] == group["responses"][rewards.argmax()]
        assert "responses" not in row
    assert [row["note"] for row in best] == [None, None, None, "only here", None, None]


@pytest.mark.slow
def test_components_are_written_one_by_one(ray_address, critics, tmp_path, monkeypatch, capsys):
    (tmp_path / "c.yaml").write_text("components:\n- {kind: critic, weight: 2}\n- {kind: length_penalty}\n")
    items = make_conversations(6)
    data = write(tmp_path / "a.jsonl", [item._asdict() for item in items])
    out = tmp_path / "out"
    arguments = [critics["first"], data, str(out), "--components", str(tmp_path / "c.yaml")]
    assert run(score.main, arguments, monkeypatch, capsys)[0] == 0
    for row, wanted in zip(read(out), rewards_by_engine(critics["first"], items), strict=True):
        assert row["reward_critic"] == pytest.approx(wanted, abs=TOLERANCE)
        assert row["reward"] == pytest.approx(2 * row["reward_critic"] + row["reward_length_penalty"], abs=TOLERANCE)


@pytest.mark.slow
def test_a_killed_job_goes_on_and_writes_every_row_once(ray_address, critics, tmp_path, monkeypatch, capsys):
    items = make_conversations(400)
    data = write(tmp_path / "a.jsonl", [{"id": number, **item._asdict()} for number, item in enumerate(items)])
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    arguments = [critics["first"], data, "--rows-per-part", "4"]
    assert run(score.main, [*arguments, str(undisturbed)], monkeypatch, capsys)[0] == 0
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs.score", *arguments, str(disturbed)],
        env={**os.environ, "RAY_ADDRESS": ray_address},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_until(lambda: len(list(disturbed.glob("part-*"))) >= 2, "the first parts", 120)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (disturbed / "summary.json").exists()
    before = {path.name: path.stat().st_mtime_ns for path in disturbed.glob("part-*")}
    assert len(before) < 100, "it was killed in the middle"
    assert run(score.main, [*arguments, str(disturbed)], monkeypatch, capsys)[0] == 0
    rows, wanted = read(disturbed), read(undisturbed)
    assert [row["id"] for row in rows] == list(range(400))
    np.testing.assert_allclose([row["reward"] for row in rows], [row["reward"] for row in wanted], atol=TOLERANCE)
    assert all((disturbed / name).stat().st_mtime_ns == changed for name, changed in before.items())
    assert not list(disturbed.glob(".part-*"))


@pytest.mark.slow
def test_what_is_of_another_job_is_left_alone(ray_address, critics, tmp_path, monkeypatch, capsys):
    data = write(tmp_path / "a.jsonl", [item._asdict() for item in make_conversations(6)])
    out = str(tmp_path / "out")
    assert run(score.main, [critics["first"], data, out], monkeypatch, capsys)[0] == 0
    before = read(out)
    for changed, field in (
        ([critics["second"], data, out], "model_version"),
        ([critics["first"], data, out, "--rows-per-part", "3"], "rows_per_part"),
        ([critics["first"], data, out, "--normalize"], "model_version"),
        ([critics["first"], write(tmp_path / "b.jsonl", [{"text": "a"}]), out], "data"),
    ):
        code, _, message = run(score.main, changed, monkeypatch, capsys)
        assert code == EXIT_REFUSED
        assert f"was started with another {field}" in message
    code, _, message = run(score.main, [critics["first"], data, str(tmp_path)], monkeypatch, capsys)
    assert code == EXIT_REFUSED
    assert "is not empty and holds no job.json" in message
    assert read(out) == before


def test_an_out_that_another_job_writes_is_left_alone(critics, tmp_path, monkeypatch, capsys):
    data = write(tmp_path / "a.jsonl", [item._asdict() for item in make_conversations(2)])
    out = tmp_path / "new" / "out"
    with lock_directory(out, "OUT", "taken"):
        out.mkdir()
        (out / ".part-000000.jsonl.half").touch()
        code, _, message = run(score.main, [critics["first"], data, str(out)], monkeypatch, capsys)
    assert code == EXIT_REFUSED
    assert f"another job is at work on {out}: wait until it ends" in message
    assert [path.name for path in out.iterdir()] == [".part-000000.jsonl.half"]


def test_an_out_that_is_no_path_is_refused_and_not_taken_for_one(critics, tmp_path, monkeypatch, capsys):
    data = write(tmp_path / "rows.jsonl", [{"text": "please"}])
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    code, _, message = run(score.main, [critics["first"], data, "s3://bucket/scores"], monkeypatch, capsys)
    assert code == EXIT_REFUSED
    assert "OUT 's3://bucket/scores' must be a path" in message
    assert sorted(tmp_path.iterdir()) == before


def test_what_json_cannot_hold_and_workers_that_find_no_place(ray_address, critics, tmp_path, monkeypatch, capsys):
    rows = [{"text": "please", "asked": datetime.date(2026, 1, 2)}] * 3
    data = write(tmp_path / "dates.parquet", rows)
    arguments = [critics["first"], data, str(tmp_path / "out")]
    code, _, message = run(score.main, [*arguments, "--format", "jsonl"], monkeypatch, capsys)
    assert code == EXIT_REFUSED
    assert "dates.parquet:1: cannot be written as JSON" in message
    assert "--format parquet" in message
    code, _, message = run(
        score.main, [*arguments, "--cpus-per-worker", "99", "--start-timeout-s", "1"], monkeypatch, capsys
    )
    assert code == EXIT_REFUSED
    assert "1 scorers with 99 CPU each could not be placed within 1 s: the cluster has 6 CPU" in message
    assert run(score.main, arguments, monkeypatch, capsys)[0] == 0
    assert [row["asked"] for row in read(tmp_path / "out")] == [datetime.date(2026, 1, 2)] * 3


@pytest.mark.parametrize(
    ("row", "at_fault"),
    [
        ({"prompt": "a", "responses": ["b", "c"]}, "a.jsonl:2: some rows have one response and others a list"),
        ({"prompt": "a", "response": "b", "note": "\ud83d"}, "a field holds half of a surrogate pair up to row 2"),
    ],
)
def test_what_parquet_cannot_hold_is_told_before_anything_is_scored(
    row, at_fault, critics, tmp_path, monkeypatch, capsys
):
    data = write(tmp_path / "a.jsonl", [{"prompt": "a", "response": "b"}, row])
    arguments = [critics["first"], data, str(tmp_path / "out"), "--format", "parquet"]
    code, _, message = run(score.main, arguments, monkeypatch, capsys)
    assert code == EXIT_REFUSED
    assert at_fault in message
    assert not (tmp_path / "out").exists()


def test_the_types_of_parquet_stay_and_a_part_that_was_lost_is_made_again(
    ray_address, critics, tmp_path, monkeypatch, capsys
):
    table = pa.table({"text": ["please", "thank you"], "number": pa.array([1, 2], pa.int8())})
    parquet.write_table(table, tmp_path / "small.parquet")
    arguments = [critics["first"], str(tmp_path / "small.parquet"), str(tmp_path / "out"), "--rows-per-part", "1"]
    assert run(score.main, arguments, monkeypatch, capsys)[0] == 0
    parts = sorted((tmp_path / "out").glob("part-*"))
    assert [parquet.read_schema(part).field("number").type for part in parts] == [pa.int8()] * 2
    before = read(tmp_path / "out")
    parts[1].unlink()
    assert run(score.main, arguments, monkeypatch, capsys)[0] == 0
    assert read(tmp_path / "out") == before


BAD = {
    "a missing response": ({"prompt": "a"}, "expected prompt and response, or prompt and responses"),
    "two ways at once": (
        {"text": "a", "messages": [{"role": "assistant", "content": "b"}]},
        "this row has messages and text",
    ),
    "a response that is no text": ({"prompt": "a", "response": 3}, "field 'response'"),
    "no responses": ({"prompt": "a", "responses": []}, "field 'responses'"),
    "a user's last turn": ({"messages": [{"role": "user", "content": "b"}]}, "the last turn must be the assistant's"),
    "a field of ours": ({"text": "a", "reward": 1.0}, "field 'reward' exists already"),
    "a field that no file can hold": ({"text": "a", "note": "\ud83d"}, "holds half of a surrogate pair"),
    "an id out of the vocabulary": ({"token_ids": [10**6]}, "token id 1000000 is not in the critic's vocabulary"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_rows(what, ray_address, critics, tmp_path, monkeypatch, capsys):
    row, at_fault = BAD[what]
    data = write(tmp_path / "a.jsonl", [{"text": "please"}, row])
    code, _, message = run(score.main, [critics["first"], data, str(tmp_path / "out")], monkeypatch, capsys)
    assert code == EXIT_REFUSED
    assert at_fault in message
    assert "a.jsonl:2" in message
    assert not list((tmp_path / "out").glob("part-*"))
