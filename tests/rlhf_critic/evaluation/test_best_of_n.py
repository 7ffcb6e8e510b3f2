"""Best-of-n rows of each shape are read or rejected, and their scores equal the definitions."""

import json
import math
import random

import numpy as np
import pytest

from rlhf_critic.data.encoding import Encoder, load_tokenizer
from rlhf_critic.errors import DataError, NonFiniteRewardError
from rlhf_critic.evaluation.best_of_n import BestOfN, evaluate_best_of_n, is_best_of_n, load_best_of_n

LISTS = {"prompt": "please", "chosen": ["of course"], "rejected": ["no", "whatever", "go away"]}
INDEXED = {"prompt": "please", "responses": ["no", "of course", "whatever"], "best": 1, "subset": "manners"}


@pytest.fixture
def encoder(tokenizer_dir):
    return Encoder(load_tokenizer(tokenizer_dir()), max_length=64)


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def row(right: int, wrong: int, subset: str = "", id: str = "") -> BestOfN:
    return BestOfN("rows:1", ((1,),) * (right + wrong), right, False, subset, id)


def test_both_shapes_are_recognised_and_preferences_are_not():
    turns = [{"role": "assistant", "content": "of course"}]
    assert is_best_of_n(LISTS)
    assert is_best_of_n(INDEXED)
    assert not is_best_of_n({"prompt": "please", "chosen": "of course", "rejected": "no"})
    assert not is_best_of_n({"prompt": "please", "chosen": turns, "rejected": turns})
    assert not is_best_of_n({"prompt": "please", "ranked": ["of course", "no"], "responses": None})


def test_right_responses_come_first_as_they_are_encoded_alone(encoder, tmp_path):
    turns = [{"role": "user", "content": "please"}]
    path = write(tmp_path / "rows.jsonl", [LISTS, {**INDEXED, "prompt": turns, "models": ["a"]}])
    lists, indexed = load_best_of_n(path, encoder)
    for loaded, texts in (
        (lists, ["of course", "no", "whatever", "go away"]),
        (indexed, ["of course", "no", "whatever"]),
    ):
        assert [list(ids) for ids in loaded.sequences] == [encoder.encode("please", text).ids for text in texts]
        assert loaded.right == 1
    assert indexed.origin == f"{path}:2"
    assert (lists.subset, indexed.subset) == ("", "manners")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rejected": []}, r":2: field 'rejected': .*at least 1"),
        ({"rejected": ["no", ""]}, r":2: field 'rejected.1': .*at least 1 character"),
        ({"rejected": None}, r":2: needs the lists 'chosen' and 'rejected', or"),
        ({"chosen": "of course"}, r":2: field 'chosen': .*tuple"),
        ({"prompt": None}, r":2: field 'prompt': Field required"),
        ({"chosen": None, "responses": ["a", "b"], "best": 2}, r":2: field 'best': 2 is not an index of the 2"),
        ({"chosen": None, "responses": ["a", "b"], "best": True}, r":2: field 'best': .*integer"),
        ({"id": "tied:4"}, r":2: field 'id': 'tied:4' needs at least two responses in 'chosen'"),
    ],
)
def test_a_row_that_is_wrong_is_named_with_its_field(encoder, tmp_path, changes, message):
    path = write(tmp_path / "rows.jsonl", [LISTS, {**LISTS, **changes}])
    with pytest.raises(DataError, match=message):
        load_best_of_n(path, encoder)


def test_texts_that_repeat_their_prompt_have_it_once(encoder, tmp_path):
    whole = {"prompt": "please", "chosen": ["please no"], "rejected": ["please go", "please, 1"]}
    (loaded,) = load_best_of_n(write(tmp_path / "rows.jsonl", [whole]), encoder)
    expected = [encoder.encode("please", text).ids for text in (" no", " go", ", 1")]
    assert [list(ids) for ids in loaded.sequences] == expected
    (answer,) = load_best_of_n(write(tmp_path / "rows.jsonl", [LISTS]), encoder)
    assert list(answer.sequences[0]) == encoder.encode("please", "of course").ids


def test_the_top_shares_its_credit_among_ties():
    rows = [row(1, 3, "a"), row(1, 3, "a"), row(1, 3, "b"), row(2, 1, "a")]
    rewards = np.array([2.0, 1, 0, 1, 0, 1, 0, 0, 5, 5, 5, 0, 1, 3, 3])
    evaluation = evaluate_best_of_n(rows, rewards)
    assert evaluation.accuracy.mean == pytest.approx((1 + 0 + 1 / 3 + 1 / 2) / 4)
    assert evaluation.chance == pytest.approx((3 * 1 / 4 + 2 / 3) / 4)
    assert evaluation.responses == pytest.approx(15 / 4)
    first, second = evaluation.subsets
    assert (first.name, first.rows, second.name, second.rows) == ("a", 3, "b", 1)
    assert first.accuracy.mean == pytest.approx((1 + 0 + 1 / 2) / 3)
    assert first.chance == pytest.approx((1 / 4 + 1 / 4 + 2 / 3) / 3)
    assert evaluation.all_right_above_wrong.mean == 0  # one such row; its lowest correct reward is below the wrong one
    assert evaluation.ties is None


def test_random_rewards_reach_chance():
    rng = np.random.default_rng(0)
    rows = [row(1, 3) for _ in range(2000)]
    accuracy = evaluate_best_of_n(rows, rng.normal(size=8000)).accuracy
    assert accuracy.low <= 0.25 <= accuracy.high


def test_the_ties_score_equals_a_slow_computation_from_its_definition():
    rng = random.Random(0)
    rows, rewards, tied, ref = [], [], {}, {}
    for prompt in range(40):
        for kind, right, wrong, found in (("tied", rng.randint(2, 5), 4, tied), ("ref", 1, 4, ref)):
            if kind == "ref" and prompt in {3, 17}:
                continue  # without its pair it counts only in the accuracy of its kind
            good = [rng.gauss(3, 0.6) for _ in range(right)]
            if prompt == 5:
                good = [4.0] * right  # no spread at all
            bad = [rng.gauss(0, 1) for _ in range(wrong)]
            rows.append(row(right, wrong, "Ties", f"{kind}:{prompt}"))
            rewards += good + bad
            found[prompt] = (min(good) - max(bad), max(good) - min(good))
    tied_accuracy = sum(gap > 0 for gap, _ in tied.values()) / len(tied)
    ref_accuracy = sum(gap > 0 for gap, _ in ref.values()) / len(ref)
    preferred = hard = margin = 0.0
    for prompt, (ref_gap, _) in ref.items():
        tied_gap, spread = tied[prompt]
        preferred += (tied_gap > spread) / len(ref)
        hard += (tied_gap > spread and ref_gap > spread) / len(ref)
        smaller = min(tied_gap, ref_gap)
        # As in rewardbench 0.1.4, a pair without spread has no ratio.
        margin += math.tanh(smaller / spread - 1) / (len(ref) - 1) if spread else 0.0
    score = 0.3 * tied_accuracy + 0.3 * ref_accuracy + 0.2 * preferred + 0.2 * hard + 0.01 * margin
    ties = evaluate_best_of_n(rows, np.array(rewards)).ties
    assert ties.pairs == 38
    assert ties.score.mean == pytest.approx(score)
    assert ties.score.low < score < ties.score.high
    expected = (tied_accuracy, ref_accuracy, preferred, hard, margin)
    assert (ties.tied_accuracy, ties.ref_accuracy, ties.preferred, ties.preferred_hard, ties.margin) == pytest.approx(
        expected
    )
    assert 0 < hard < preferred < 1


def test_a_reward_that_is_not_finite_is_refused():
    with pytest.raises(NonFiniteRewardError, match=r"rows:1"):
        evaluate_best_of_n([row(1, 1)], np.array([0.0, math.inf]))


def test_a_preference_with_a_field_of_responses_stays_a_preference():
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "responses": ["a", "b"]}
    assert not is_best_of_n(row)
    assert is_best_of_n({"prompt": "p", "responses": ["a", "b"], "best": 0})
