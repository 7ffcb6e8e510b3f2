"""RewardBench's scripts give an export our rewards, and so our totals."""

import json
import shutil

import numpy as np

from rlhf_critic.evaluation.best_of_n import BestOfN
from rlhf_critic.evaluation.rewardbench import SECTIONS, score_benchmark
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


def test_totals_of_both_versions_are_theirs(peer):
    contract = peer("rewardbench")
    rng = np.random.default_rng(0)
    names = [name for weights in SECTIONS.values() for name in weights]
    pairs = [(names[index % len(names)], *rng.integers(0, 5, 2).tolist()) for index in range(200)]  # some are equal
    best_of = [(str(index), name, 1, rng.integers(0, 6, 4)) for index, name in enumerate(["Focus", "Math"] * 30)]
    for prompt in range(25):
        best_of.append((f"ref:{prompt}", "Ties", 1, rng.normal([2, 0, 0], 1)))
        spread = 0.0 if prompt == 3 else 0.5  # one pair whose correct responses have equal scores
        best_of.append((f"tied:{prompt}", "Ties", 3, np.append(2 + spread * rng.normal(size=3), rng.normal(size=2))))
    request = {
        "version_1": [{"subset": name, "chosen": one, "rejected": other} for name, one, other in pairs],
        "version_2": [
            {"id": id, "subset": name, "num_correct": right, "scores": np.asarray(scores, float).tolist()}
            for id, name, right, scores in best_of
        ],
    }
    answer = contract.run("ask_rewardbench_totals", request)
    rows = [BestOfN("row", ((1,), (1,)), 1, False, name, "") for name, *_ in pairs]
    first = score_benchmark("rewardbench", rows, np.array([score for _, *sides in pairs for score in sides], float))
    rows = [BestOfN("row", ((1,),) * len(scores), right, False, name, id) for id, name, right, scores in best_of]
    second = score_benchmark("rewardbench2", rows, np.concatenate([scores for *_, scores in best_of]).astype(float))
    for what, theirs, ours in (
        ("rewardbench, subsets of version 1", answer["subsets_1"], first.subsets),
        ("rewardbench, sections of version 1", answer["sections_1"], first.sections),
        ("rewardbench, subsets of version 2", answer["subsets_2"], second.subsets),
    ):
        assert theirs.keys() == ours.keys()
        contract.compare(what, [theirs[name] for name in sorted(theirs)], [ours[name] for name in sorted(ours)])
