"""Settings for GPUs leave CPUs alone."""

import pytest
import torch

from rlhf_critic.errors import ConfigError
from rlhf_critic.model import device as device_module
from rlhf_critic.model.device import configure_device, is_working, select_device


def test_a_gpu_that_is_missing_is_named():
    assert select_device(use_gpu=False).type == "cpu"
    with pytest.raises(ConfigError, match=r"use_gpu: torch finds no GPU.*nvidia-smi"):
        select_device(use_gpu=True)


@pytest.fixture
def settings(monkeypatch):
    """The settings that were made, instead of making them."""
    made = {}
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda value: made.update(precision=value))
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda value: made.update(deterministic=value))
    monkeypatch.setattr(device_module.torch.backends.cudnn, "benchmark", True)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    return made


def test_fp32_multiplies_in_tf32_on_a_gpu_only(settings):
    configure_device(torch.device("cpu"), torch.float32, deterministic=True)
    assert settings == {}
    configure_device(torch.device("cuda"), torch.float32)
    assert settings == {"precision": "high"}
    configure_device(torch.device("cuda"), torch.bfloat16, deterministic=True)
    assert settings == {"precision": "highest", "deterministic": True}


def test_a_gpu_works_until_it_computes_no_more(monkeypatch):
    assert is_working(torch.device("cpu"))
    for error, works in ((RuntimeError("an illegal memory access"), False), (torch.OutOfMemoryError(), True)):

        def fail(*arguments, error=error, **options):
            raise error

        monkeypatch.setattr(torch, "ones", fail)
        assert is_working(torch.device("cuda")) is works
