"""Processes get the variables of their device."""

from actors.runtime.environment import compute_environment


def test_the_allocator_is_the_users_choice(monkeypatch):
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    assert compute_environment(use_gpu=False, deterministic=True) == {"DS_ACCELERATOR": "cpu"}
    assert compute_environment(use_gpu=True) == {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    assert {"CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO"} < compute_environment(True, deterministic=True).keys()
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:512")
    assert compute_environment(use_gpu=True) == {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512"}
