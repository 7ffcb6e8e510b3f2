"""The printed statistics match the data, and examples match the critic's encoding."""

import json

from jobs import inspect_data as inspect_job
from rlhf_critic.data.encoding import Encoder, load_tokenizer
from tests.jobs.command_line import run

WORDS = "please explain how this works of course I am glad no that is a question".split()


def test_a_table_and_examples(tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    pairs = [{"prompt": f"please {word}", "chosen": "of course I am glad", "rejected": word} for word in WORDS]
    turned = {"prompt": pairs[0]["prompt"], "chosen": pairs[0]["rejected"], "rejected": pairs[0]["chosen"]}
    rows = [
        *pairs,
        pairs[1],
        turned,
        {**pairs[2], "rejected": pairs[2]["chosen"]},
        {**pairs[3], "chosen": "glad " * 99},
        {**pairs[5], "chosen": "of course</s>"},
    ]
    (tmp_path / "first.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "second.json").write_text(json.dumps([{"prompt": "other", "ranked": ["a", "b", "c"]}, pairs[4]]))
    arguments = ["--model", tiny_model, "--encoding.max-length", "64", "--overlong", "skip", "--examples", "2"]
    sources = [str(tmp_path / "first.jsonl"), str(tmp_path / "second.json")]
    code, output, _ = run(inspect_job.main, [*sources, *arguments, "--cache-dir", str(tmp_path)], monkeypatch, capsys)
    assert code == 0
    cells = [[cell.strip() for cell in line.split("│")[1:3]] for line in output.splitlines() if line.count("│") == 3]
    first = dict(cells[: next(n for n, (what, _) in enumerate(cells) if n and what == "rows read")])
    assert first["rows read"] == str(len(rows))
    assert first["preferences to train on"] == str(len(rows) - 2)
    assert first["skipped (over 64 tokens)"] == "1"
    assert first["skipped (identical responses)"] == "1"
    assert first["duplicates"] == "1"
    assert first["special tokens inside texts (read as text)"] == "1"
    assert first["responses that the template drops or changes (kept whole)"] == "0"
    assert first["responses whose white space the template changes"] == "0"
    assert first["contradictions (same responses, opposite order)"] == "1"
    assert ["standard, explicit prompt, ranked", "1"] in cells
    assert [f"preferences with a prompt of {sources[0]}", "1"] in cells
    encoder = Encoder(load_tokenizer(tiny_model), 64)
    seen = encoder.tokenizer.decode(encoder.encode(pairs[0]["prompt"], pairs[0]["chosen"]).ids)
    assert seen.endswith("</s>")
    assert seen in output
    assert f"{sources[0]}:1" in output
    assert f"{sources[1]}:2" in output
