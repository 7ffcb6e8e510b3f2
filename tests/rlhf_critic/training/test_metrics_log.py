"""A history has each step once, even after a crash in the middle of a line."""

import json
import time

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlhf_critic.training.metrics_log import MetricsLog


def test_a_resumed_history_has_each_step_once(tmp_path):
    log = MetricsLog(tmp_path, 0)
    for step in range(1, 6):
        log.write("train", step, {"loss": float(step)})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    time.sleep(1.1)  # TensorBoard orders the files of one process by their seconds
    resumed = MetricsLog(tmp_path, 3)
    for step in (4, 5):
        resumed.write("train", step, {"loss": 10.0 * step})
    resumed.close()
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(record["step"], record["loss"]) for record in records] == [
        (1, 1.0),
        (2, 2.0),
        (3, 3.0),
        (4, 40.0),
        (5, 50.0),
    ]
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("train/loss")] == [
        (record["step"], record["loss"]) for record in records
    ]
