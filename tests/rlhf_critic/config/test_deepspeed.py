"""DeepSpeed's configuration on CPUs and GPUs, and what auto stands for."""

import pytest

from rlhf_critic.config.deepspeed import (
    BUCKET_PER_RANK,
    CPU,
    CPU_BUCKET,
    MAX_GPU_BUCKET,
    Hardware,
    bucket_elements,
    deepspeed_config,
)
from rlhf_critic.config.model import BodyConfig, ModelConfig, OptimizerConfig
from rlhf_critic.config.ppo import PPOJobConfig
from rlhf_critic.config.train import TrainJobConfig

SIXTEEN = Hardware(on_gpu=True, ranks=16)


def config(stage: int, hardware: Hardware = CPU, dtype: str = "auto") -> dict:
    return deepspeed_config(ModelConfig(dtype=dtype), OptimizerConfig(zero_stage=stage), hardware)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_no_timer_waits_for_the_device(stage):
    from deepspeed.utils.config import get_timers_config

    for hardware in (Hardware(), SIXTEEN):
        assert not get_timers_config(config(stage, hardware)).enabled


def test_gpus_overlap_communication_and_cpus_keep_deepspeeds_choice():
    assert config(2, SIXTEEN)["zero_optimization"]["overlap_comm"] is True
    assert config(2, Hardware(on_gpu=True))["zero_optimization"]["overlap_comm"] is False
    assert "overlap_comm" not in config(2)["zero_optimization"]


def test_buckets_grow_with_the_ranks_and_never_exceed_the_model():
    assert bucket_elements(None, Hardware(ranks=64)) == CPU_BUCKET
    assert bucket_elements(None, Hardware(on_gpu=True)) == CPU_BUCKET
    assert bucket_elements(None, Hardware(on_gpu=True, ranks=16)) == 16 * BUCKET_PER_RANK
    assert bucket_elements(None, Hardware(on_gpu=True, ranks=1024)) == MAX_GPU_BUCKET
    assert bucket_elements(1000, Hardware(on_gpu=True, ranks=16)) == 1000
    assert bucket_elements(0, Hardware(on_gpu=True)) == 1


def test_auto_is_bf16_on_a_gpu_and_fp32_on_a_cpu():
    assert BodyConfig().resolved(on_gpu=True).dtype == "bfloat16"
    assert BodyConfig().resolved(on_gpu=False).dtype == "float32"
    assert BodyConfig(dtype="float32").resolved(on_gpu=True).dtype == "float32"
    assert config(2, SIXTEEN)["bf16"] == {"enabled": True}
    assert config(2)["bf16"] == {"enabled": False}


def test_jobs_resolve_auto_by_their_device():
    for use_gpu, expected in ((False, "float32"), (True, "bfloat16")):
        train = TrainJobConfig.model_validate({"run": {"use_gpu": use_gpu}}).resolved()
        assert train.model.dtype == expected
        ppo = PPOJobConfig.model_validate({"run": {"use_gpu": use_gpu}}).resolved()
        assert (ppo.policy.model.dtype, ppo.critic.model.dtype) == (expected, expected)
