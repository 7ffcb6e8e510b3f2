"""What cannot be written is told when it is saved, and only then."""

from pathlib import Path

import pytest

from actors.training.run_logger import RunLogger
from rlhf_critic.config.train import TrainJobConfig
from rlhf_critic.errors import CheckpointError
from rlhf_critic.training.critic_engine import StepMetrics
from rlhf_critic.training.metrics_log import read_metrics

FULL = Path("/dev/full")


def step(number: int) -> StepMetrics:
    numbers = dict.fromkeys(StepMetrics.__dataclass_fields__, 0.5)
    return StepMetrics(**{**numbers, "step": number, "tokens": 10})


@pytest.fixture
def history(ray_address, tmp_path):
    return RunLogger(TrainJobConfig.model_validate({"run": {"name": "run", "storage_path": str(tmp_path)}}), 0, 4)


def test_what_is_recorded_is_there_when_it_is_saved(history, tmp_path):
    with history:
        for number in (1, 2):
            history.trained(step(number), seconds=2.0)
        history.save()
        records = read_metrics(tmp_path / "run" / "history")
    assert [record["step"] for record in records] == [1, 2]
    assert records[0]["tokens_per_second"] == 5.0


@pytest.mark.skipif(not FULL.exists(), reason="needs a device that is always full")
def test_a_full_disk_disturbs_no_step_and_fails_the_next_save(history):
    history._log._file.close()
    history._log._file = FULL.open("w")
    with pytest.raises(CheckpointError, match=r"No space left.*go on with --resume"), history:
        for number in (1, 2):
            history.trained(step(number), seconds=2.0)
        history.save()
