"""The summary of an offline scoring job is that of all rewards together."""

import json

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from actors.serving.offline import RewardSums


def test_running_sums_are_those_of_all_rewards(tmp_path):
    rng = np.random.default_rng(0)
    sums, every = RewardSums(), []
    for number, rows in enumerate((3, 1, 40)):
        rewards = [rng.normal(100, 1, size=rng.integers(1, 4)).tolist() for _ in range(rows)]
        every += [reward for of_row in rewards for reward in of_row]
        written = [{"reward": of_row, "truncated": [True] * len(of_row)} for of_row in rewards]
        path = tmp_path / f"{number}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in written))
        sums.add(path)
    parquet.write_table(pa.table({"reward": [99.5, 7.0], "truncated": [False, True]}), tmp_path / "single.parquet")
    sums.add(tmp_path / "single.parquet")
    every += [99.5, 7.0]
    assert (sums.rows, sums.responses, sums.truncated) == (46, len(every), len(every) - 1)
    assert sums.mean == pytest.approx(np.mean(every), rel=1e-12)
    assert sums.std == pytest.approx(np.std(every), rel=1e-9)
