"""Devices: choice, health, and settings of torch for them, such as TF32 and deterministic kernels."""

from __future__ import annotations

import torch

from rlhf_critic.errors import ConfigError


def select_device(use_gpu: bool) -> torch.device:
    """Returns the device of this process.

    Raises:
        ConfigError: A GPU is wanted, and torch finds none.
    """
    if use_gpu and not torch.cuda.is_available():
        raise ConfigError(
            "use_gpu: torch finds no GPU in this process. Check `nvidia-smi` and that torch is a build for CUDA, or "
            "leave use_gpu off"
        )
    return torch.device("cuda" if use_gpu else "cpu")


def configure_device(device: torch.device, dtype: torch.dtype, deterministic: bool = False) -> None:
    """Configures torch in this process for models of a dtype on a device. Does nothing for a CPU.

    Matrix products in fp32 use TF32 on a GPU: 10 bits of mantissa instead of 23, and about eight times the speed.
    Models in bf16 leave it off, so that their head in fp32 stays exact.

    Args:
        device: The device that computes.
        dtype: Dtype of the parameters.
        deterministic: Whether to use kernels that give the same bits in every run. They are slower.
    """
    if device.type != "cuda":
        return
    torch.set_float32_matmul_precision("high" if dtype == torch.float32 else "highest")
    if deterministic:
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = False


def is_working(device: torch.device) -> bool:
    """Returns whether a device still computes. After some errors, such as an illegal access, a GPU never does again."""
    if device.type != "cuda":
        return True
    try:
        return torch.ones(2, device=device).sum().item() == 2.0
    except torch.OutOfMemoryError:
        return True
    except RuntimeError:
        return False
