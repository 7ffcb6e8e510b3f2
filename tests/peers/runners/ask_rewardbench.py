"""Scores with RewardBench's two scripts on a CPU.

Request: ``model`` (a directory), ``pairs`` and ``best_of`` (files of rows for version 1 and 2), ``batch_size``.
"""

import importlib
import json
import sys

import transformers

asked, answered = sys.argv[1:]
with open(asked, encoding="utf-8") as file:
    request = json.load(file)
# Its pipeline moves every batch to "cuda". There is none here.
move = transformers.BatchEncoding.to
transformers.BatchEncoding.to = lambda batch, device, **options: move(batch, "cpu", **options)

answer = {}
first = importlib.import_module("rewardbench.rewardbench")
first.rewardbench(
    first.Args(
        model=request["model"],
        dataset=request["pairs"],
        load_json=True,
        not_quantized=True,
        torch_dtype="float32",
        batch_size=request["batch_size"],
        output_dir="results/",
    )
)
with open(f"results/{request['model']}_outputs.jsonl", encoding="utf-8") as file:
    rows = [json.loads(line) for line in file]
answer["version_1"] = {key: [row[key] for row in rows] for key in ("scores_chosen", "scores_rejected", "text_chosen")}
with open(f"results/{request['model']}.json", encoding="utf-8") as file:
    answer["accuracy"] = json.load(file)["accuracy"]

second = importlib.import_module("scripts.run_v2")
kept = {}
reroll = second.reroll_and_score_dataset


def keep_scores(dataset, *arguments, **options):
    """Keeps what the script would upload to the hub."""
    kept.update(scores=list(dataset["scores"]), text=list(dataset["text"]))
    result = reroll(dataset, *arguments, **options)
    kept["results"] = [float(value) for value in result["results"]]
    return result


second.reroll_and_score_dataset = keep_scores
options = {"model": request["model"], "dataset": request["best_of"], "torch_dtype": "float32"}
options["batch_size"] = str(request["batch_size"])
sys.argv = ["run_v2", *(word for name, value in options.items() for word in (f"--{name}", value))]
sys.argv += ["--do_not_save", "--disable_beaker_save"]
second.main()
answer["version_2"] = kept
with open(answered, "w", encoding="utf-8") as file:
    json.dump(answer, file)
