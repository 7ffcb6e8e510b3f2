"""RewardBench's scripts give an export our rewards, and so our totals."""

import json
import shutil

import numpy as np

from tests.actors.scorers import rewards_by_engine
from tests.peers.contract import turns_of


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path.name


def test_both_versions_score_our_export_with_our_numbers(peer, export, pairs, tmp_path):
    contract = peer("rewardbench")
    shutil.copytree(export, tmp_path / "critic")  # it writes results beside the name of the model
    chosen, rejected = (list(side) for side in zip(*pairs, strict=True))
    best_of = [
        {"id": str(index), "prompt": one.prompt, "chosen": [one.response], "rejected": [other.response]}
        | {"num_correct": 1, "total_completions": 2, "subset": "words"}
        for index, (one, other) in enumerate(pairs)
    ]
    request = {
        "model": "critic",
        "batch_size": 4,
        "pairs": write_rows(
            tmp_path / "pairs.jsonl",
            [
                {"prompt": one[0]["content"], "chosen": one, "rejected": other}
                for one, other in zip(turns_of(chosen), turns_of(rejected), strict=True)
            ],
        ),
        "best_of": write_rows(tmp_path / "best_of.jsonl", best_of),
    }
    answer = contract.run("ask_rewardbench", request)
    ours = [rewards_by_engine(export, side) for side in (chosen, rejected)]
    for side, name in enumerate(("chosen", "rejected")):
        theirs = np.ravel(answer["version_1"][f"scores_{name}"])
        contract.compare(f"our export: rewardbench, {name} responses", theirs, ours[side])
    contract.compare("our export: rewardbench, accuracy", answer["accuracy"], (ours[0] > ours[1]).mean())
    theirs = [score for row in answer["version_2"]["scores"] for score in row]
    contract.compare(
        "our export: scripts/run_v2.py", theirs, [reward for pair in zip(*ours, strict=True) for reward in pair]
    )
    contract.compare("our export: scripts/run_v2.py, results", answer["version_2"]["results"], ours[0] > ours[1])
