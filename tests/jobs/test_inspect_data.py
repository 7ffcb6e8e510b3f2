"""The printed statistics match the data, and examples match the critic's encoding."""

import json

from jobs import inspect_data as inspect_job
from rlhf_critic.data.encoding import Encoder, load_tokenizer
from tests.jobs.command_line import run
from tests.rlhf_critic.checkpoint.test_reward_model import EOS, change_config, save_reward_model

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
    start = next(n for n, (what, _) in enumerate(cells) if n and what == "rows read")
    first, second = dict(cells[:start]), dict(cells[start:])
    assert first["rows read"] == str(len(rows))
    assert first["preferences to train on"] == str(len(rows) - 2)
    assert first["skipped (over 64 tokens)"] == "1"
    assert first["skipped (identical responses)"] == "1"
    assert first["duplicates"] == "1"
    assert first["special tokens inside texts (read as text)"] == "1"
    assert first["responses that the template drops or changes (kept whole)"] == "0"
    assert first["responses whose white space the template changes"] == "0"
    assert first["contradictions (same responses, opposite order)"] == "1"
    repeated = "duplicates, sources before this one included (data.deduplicate leaves them out)"
    assert [first[repeated], second["duplicates"], second[repeated]] == ["1", "0", "1"]
    assert ["standard, explicit prompt, ranked", "1"] in cells
    assert [f"preferences with a prompt of {sources[0]}", "1"] in cells
    encoder = Encoder(load_tokenizer(tiny_model), 64)
    seen = encoder.tokenizer.decode(encoder.encode(pairs[0]["prompt"], pairs[0]["chosen"]).ids)
    assert seen.endswith("</s>")
    assert seen in output
    assert f"{sources[0]}:1" in output
    assert f"{sources[1]}:2" in output


def test_texts_end_where_a_model_that_pads_with_eos_reads_its_score(tmp_path, monkeypatch, capsys):
    model = save_reward_model(tmp_path / "model", pad_is_eos=True)
    change_config(model, pad_token_id=EOS)
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"prompt": "please", "chosen": "of course", "rejected": "no"}))
    options = ["--model", str(model), "--examples", "1", "--cache-dir", str(tmp_path)]
    _, output, _ = run(inspect_job.main, [str(data), *options], monkeypatch, capsys)
    assert "<|assistant|>of course\n" in output.replace(" ", "\n").replace("of\ncourse", "of course")


def test_a_report_has_the_statistics_lengths_and_examples_of_each_source(tiny_model, tmp_path, monkeypatch, capsys):
    answer = [{"role": "assistant", "content": "of course"}]
    turns = [{"role": "system", "content": " "}, {"role": "user", "content": "why"}]
    chats = [{"prompt": turns, "chosen": answer, "rejected": [{"role": "assistant", "content": "no <script>"}]}]
    texts = [{"prompt": f"please {word}", "chosen": "of course I am glad", "rejected": word} for word in WORDS]
    for name, rows in (("chats", chats), ("texts", texts)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = [str(tmp_path / "chats.jsonl"), str(tmp_path / "texts.jsonl")]
    (tmp_path / "benchmark.jsonl").write_text(json.dumps({"text": "please explain. Of course I am GLAD!"}))
    arguments = ["--model", tiny_model, "--cache-dir", str(tmp_path), "--report", str(tmp_path / "report")]
    arguments += ["--decontaminate", str(tmp_path / "benchmark.jsonl"), "--decontaminate-ngram", "6"]
    code, output, _ = run(inspect_job.main, [*sources, *arguments], monkeypatch, capsys)
    assert code == 0
    assert f"report: {tmp_path / 'report'}" in output.replace("\n", "")
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count("<svg") == 2
    assert page.count('class="example"') == 1 + 3
    assert "no &lt;script&gt;" in page
    metrics = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert metrics[sources[0]]["roles"] == {"system": 1, "user": 1, "assistant": 2}
    assert [metrics[source]["empty_turns"] for source in sources] == [1, 0]
    assert [metrics[source]["contaminated"] for source in sources] == [0, 1]
    assert metrics[sources[1]]["preferences"] == len(texts) - 1
    code, _, message = run(inspect_job.main, [*sources, *arguments], monkeypatch, capsys)
    assert code == 2
    assert "report is not an empty directory" in message


def test_data_with_targets_alone_has_statistics_and_a_report(tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    rows = [{"prompt": "why", "response": word, "score": number} for number, word in enumerate(WORDS)]
    data = tmp_path / "rated.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [str(data), "--model", tiny_model, "--cache-dir", str(tmp_path), "--report", str(tmp_path / "report")]
    code, output, _ = run(inspect_job.main, arguments, monkeypatch, capsys)
    assert code == 0
    cells = dict(
        [cell.strip() for cell in line.split("│")[1:3]] for line in output.splitlines() if line.count("│") == 3
    )
    assert (cells["preferences to train on"], cells["rows with targets"]) == ("0", str(len(rows)))
    assert cells["the longer response is preferred"].startswith("none")
    assert "tokens of a response with targets with its prompt, percentiles" in cells
    assert "with a target: score" in (tmp_path / "report" / "report.html").read_text()


def test_several_bad_rows_are_named_in_one_run(tiny_model, tmp_path, monkeypatch, capsys):
    good = json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"})
    data = tmp_path / "bad.jsonl"
    arguments = [str(data), "--model", tiny_model, "--cache-dir", str(tmp_path)]

    def errors_of(rows: list[str]) -> list[str]:
        data.write_text("".join(f"{row}\n" for row in rows))
        code, _, message = run(inspect_job.main, arguments, monkeypatch, capsys)
        assert code == 2
        return message.strip().splitlines()

    no_chosen = json.dumps({"prompt": "a", "rejected": "c"})
    first, second = errors_of([good, no_chosen, good, '{"prompt": 3, "chosen": "b", "rejected": "c"}', good])
    assert f"{data}:2: field 'chosen': missing" in first
    assert f"{data}:4: field 'prompt'" in second
    *named, stopped = errors_of([good, *[no_chosen] * 12])
    assert [line.partition("bad.jsonl:")[2].partition(":")[0] for line in named] == [str(line) for line in range(2, 12)]
    assert stopped == "(reading stopped after 10 invalid rows)"
    missing, syntax = errors_of([no_chosen, good, '{"prompt"', no_chosen])
    assert f"{data}:1" in missing
    assert f"{data}:3" in syntax
