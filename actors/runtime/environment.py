"""Environment variables of processes that compute on a CPU or a GPU."""

from __future__ import annotations

import os


def compute_environment(use_gpu: bool, deterministic: bool = False) -> dict[str, str]:
    """Returns the variables that a process needs before it loads torch or DeepSpeed.

    Args:
        use_gpu: Whether the process uses a GPU.
        deterministic: Whether the same run must give the same weights. CPUs need no variable for that.
    """
    if not use_gpu:
        return {"DS_ACCELERATOR": "cpu"}
    # Micro-batches differ in size. Segments of fixed size would leave gaps that no later tensor fits.
    allocator = os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    # cuBLAS needs a workspace of fixed size, and NCCL one algorithm for all message sizes.
    fixed = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "Ring"} if deterministic else {}
    return {"PYTORCH_CUDA_ALLOC_CONF": allocator, **fixed}
