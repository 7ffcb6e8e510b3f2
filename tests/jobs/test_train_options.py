"""What the driver refuses before it starts anything."""

import pytest

from jobs.train import RAY_PACKAGE_FOLDER, train
from rlhf_critic.config import TrainJobConfig
from rlhf_critic.errors import ConfigError


def test_checkpoints_do_not_go_into_the_copy_of_a_working_directory(tmp_path, monkeypatch):
    package = tmp_path / RAY_PACKAGE_FOLDER / "_ray_pkg_0"
    package.mkdir(parents=True)
    monkeypatch.chdir(package)
    config = TrainJobConfig.model_validate({"model": {"path": "m"}, "data": {"train": "d"}})
    with pytest.raises(ConfigError, match=r"run\.storage_path 'runs' is relative"):
        train(config)


def test_a_run_name_is_one_directory():
    with pytest.raises(ValueError, match="must be a single directory name"):
        TrainJobConfig.model_validate({"run": {"name": "../elsewhere"}})
