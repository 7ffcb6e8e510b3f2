"""Totals of RewardBench's scoring code for given scores.

Request: ``version_1`` (rows with ``subset`` and the scores ``chosen`` and ``rejected``) and ``version_2`` (rows with
``id``, ``subset``, ``scores`` and ``num_correct``).
"""

import json
import sys

from datasets import Dataset
from rewardbench.constants import EXAMPLE_COUNTS, SUBSET_MAPPING
from rewardbench.utils import calculate_scores_per_section, process_single_model, reroll_and_score_dataset

asked, answered = sys.argv[1:]
with open(asked, encoding="utf-8") as file:
    request = json.load(file)

results = {}
for row in request["version_1"]:
    results.setdefault(row["subset"], []).append(1 if row["chosen"] > row["rejected"] else 0)
subsets = {name: sum(found) / len(found) for name, found in results.items()}
answer = {"subsets_1": subsets, "sections_1": calculate_scores_per_section(EXAMPLE_COUNTS, SUBSET_MAPPING, subsets)}

answer["subsets_2"] = {}
for name in dict.fromkeys(row["subset"] for row in request["version_2"]):
    rows = [row for row in request["version_2"] if row["subset"] == name]
    if name == "Ties":
        _, answer["subsets_2"][name] = process_single_model(Dataset.from_list(rows))
        continue
    flat = [{"text": "", "scores": score, "id": row["id"]} for row in rows for score in row["scores"]]
    scored = reroll_and_score_dataset(Dataset.from_list(flat), [len(row["scores"]) for row in rows])
    answer["subsets_2"][name] = sum(scored["results"]) / len(rows)
with open(answered, "w", encoding="utf-8") as file:
    json.dump(answer, file, default=float)
