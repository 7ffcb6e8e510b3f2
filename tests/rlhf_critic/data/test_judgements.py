"""Judged preferences are what training reads, and lines of many writers stay whole."""

import json
import multiprocessing
import os

import pytest

from rlhf_critic.data import judgements
from rlhf_critic.data.judgements import append_line, preference_line, prepare_file
from rlhf_critic.data.preference_schema import parse_row
from rlhf_critic.data.sources import read_rows
from rlhf_critic.errors import ConfigError, DataError

TURNS = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
HOSTILE = '<script>alert(1)</script>\r\n"\\ \u2028\u0085\x00 مرحبا 👩‍👩‍👧 <|im_end|>'


@pytest.mark.parametrize("prompt", ["Name a prime.", "", HOSTILE, TURNS], ids=["text", "empty", "hostile", "turns"])
def test_training_reads_the_preference_that_was_judged(prompt, tmp_path):
    file = tmp_path / "judged.jsonl"
    append_line(file, preference_line(prompt, HOSTILE, "9", judge=HOSTILE, chosen_reward=-1.0, rejected_reward=2.0))
    ((line, row),) = read_rows(str(file))
    read = parse_row(f"{file}:{line}", row, {})
    assert read.conversations() == [(prompt, HOSTILE), (prompt, "9")]
    assert read.margin is None, "a row of a critic that disagrees is no contradiction"


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected", "why"),
    [
        ("p", "a", "a", "are equal"),
        ("p", "", "a", "'chosen'"),
        ("p", "\n\nHuman: p\n\nAssistant: a", "\n\nHuman: p\n\nAssistant: b", "as a transcript"),
    ],
)
def test_a_pair_that_training_would_read_otherwise_is_rejected(prompt, chosen, rejected, why):
    with pytest.raises(DataError, match=why):
        preference_line(prompt, chosen, rejected)


def test_lines_of_concurrent_processes_stay_whole(tmp_path):
    file = tmp_path / "judged.jsonl"
    context = multiprocessing.get_context("fork")  # spawned ones would import torch first
    writers = [context.Process(target=write_many, args=(file, writer)) for writer in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    found = [json.loads(line) for line in file.read_text().splitlines()]
    assert sorted((one["writer"], one["number"]) for one in found) == [(w, n) for w in range(4) for n in range(25)]
    assert all(one["text"] == str(one["writer"]) * 20_000 for one in found)


def write_many(file, writer):
    for number in range(25):
        text = str(writer) * 20_000  # more than a pipe or a page holds
        append_line(file, json.dumps({"writer": writer, "number": number, "text": text}))


def test_a_last_line_without_an_end_stays_a_line_of_its_own(tmp_path):
    file = tmp_path / "judged.jsonl"
    file.write_text('{"a": 1}')
    append_line(file, '{"b": 2}')
    assert file.read_text() == '{"a": 1}\n{"b": 2}\n'


def test_a_line_that_does_not_fit_the_disk_leaves_nothing(tmp_path, monkeypatch):
    file = tmp_path / "judged.jsonl"
    append_line(file, '{"a": 1}')
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:5]))
    with pytest.raises(OSError, match="in part only"):
        append_line(file, '{"b": 2}')
    monkeypatch.undo()
    append_line(file, '{"c": 3}')
    assert file.read_text() == '{"a": 1}\n{"c": 3}\n'


def test_a_lock_that_is_never_freed_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(judgements, "LOCK_TIMEOUT_S", 0.1)
    file = tmp_path / "judged.jsonl"
    with file.open("wb") as held:
        judgements._lock(held.fileno())
        with pytest.raises(OSError, match="holds the lock"):
            append_line(file, "{}")
    append_line(file, "{}")


def test_the_operators_file_is_checked_before_a_pool_starts(tmp_path):
    file = prepare_file(tmp_path / "new.jsonl")
    assert os.path.isabs(file)
    assert os.path.getsize(file) == 0
    for wrong in (tmp_path, tmp_path / "missing" / "file", "/dev/null"):
        with pytest.raises(ConfigError, match=r"collect: .*name another file"):
            prepare_file(wrong)
