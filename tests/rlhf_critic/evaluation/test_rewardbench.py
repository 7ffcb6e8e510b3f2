"""Benchmarks are read in their public layouts and scored by their definitions; tests/peers compares their own code."""

import json

import numpy as np
import pytest

from rlhf_critic.data.encoding import Encoder, load_tokenizer
from rlhf_critic.errors import DataError
from rlhf_critic.evaluation.best_of_n import BestOfN
from rlhf_critic.evaluation.rewardbench import SECTIONS, load_benchmark, score_benchmark


def row(subset: str, right: int = 1, wrong: int = 1, id: str = "") -> BestOfN:
    return BestOfN("rows:1", ((1,),) * (right + wrong), right, False, subset, id)


@pytest.fixture
def encoder(tokenizer_dir):
    return Encoder(load_tokenizer(tokenizer_dir()), max_length=64)


def test_both_layouts_are_read(encoder, tmp_path):
    first = {"prompt": "please", "chosen": "of course", "rejected": "no", "subset": "hep-go", "id": 7}
    second = {"id": "12", "prompt": "please", "chosen": ["of course"], "rejected": ["no", "go", "a"], "subset": "Focus"}
    for name, one, responses in (("rewardbench", first, 2), ("rewardbench2", second, 4)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text(json.dumps(one) + "\n")
        (loaded,) = load_benchmark(name, str(path), encoder)
        assert len(loaded.sequences) == responses
        assert list(loaded.sequences[0]) == encoder.encode("please", "of course").ids
        path.write_text(json.dumps({**one, "subset": None}) + "\n")
        with pytest.raises(DataError, match=r":1: field 'subset': missing"):
            load_benchmark(name, str(path), encoder)


def test_sections_weigh_subsets_and_a_tie_is_an_error():
    rows = [row("alpacaeval-easy"), row("alpacaeval-easy"), row("mt-bench-easy"), row("math-prm"), row("hep-go")]
    result = score_benchmark("rewardbench", rows, np.array([1.0, 0, 2, 2, 3, 1, 0, 1, 5, 1]))
    assert result.subsets == {"alpacaeval-easy": 0.5, "mt-bench-easy": 1.0, "math-prm": 0.0, "hep-go": 1.0}
    chat, reasoning = (0.5 * 100 + 1.0 * 28) / 128, 164 / (984 + 164)
    assert result.sections == pytest.approx({"Chat": chat, "Reasoning": reasoning})
    assert result.total == pytest.approx((chat + reasoning) / 2)
    assert len(result.missing) == sum(map(len, SECTIONS.values())) - 4


def test_version_2_shares_credit_and_scores_ties_apart():
    rows = [row("Focus", 1, 3), row("Focus", 1, 3), row("Ties", 2, 1, "tied:1"), row("Ties", 1, 1, "ref:1")]
    result = score_benchmark("rewardbench2", rows, np.array([1.0, 0, 0, 0, 2, 2, 0, 0, 5, 4, 1, 3, 2]))
    assert result.subsets["Focus"] == pytest.approx((1 + 1 / 2) / 2)
    # Gaps 3 and 1, spread 1: all parts but preferred_hard, whose smaller gap equals the spread.
    assert result.subsets["Ties"] == pytest.approx(0.3 + 0.3 + 0.2 + 0.01 * np.tanh(0))
    assert result.total == pytest.approx(np.mean(list(result.subsets.values())))
    assert result.sections == {}
