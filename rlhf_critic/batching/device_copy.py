"""Copies between the host and a device that wait as little as possible: through pinned memory on a GPU.

A copy from ordinary memory makes the host wait until the GPU has done all work before it, so that the GPU idles
afterwards. A copy from or to pinned memory is queued like a kernel. Knows nothing about the contents of the tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNMENT = 16  # bytes; kernels read vectors of up to 16 bytes


def is_gpu(device: torch.device | str) -> bool:
    """Returns whether a device is a GPU, which runs behind the host."""
    return torch.device(device).type == "cuda"


def copy_to_device(tensors: Sequence[Tensor], device: torch.device | str) -> list[Tensor]:
    """Copies tensors from the host to a device. On the CPU it returns them as they are.

    A tensor that occurs several times is copied once.

    Args:
        tensors: Tensors on the CPU, of any shapes and dtypes.
        device: The device.

    Returns:
        The tensors on the device, in the same order. On a GPU they are views of one buffer.
    """
    if not is_gpu(device):
        return [tensor.to(device) for tensor in tensors]
    unique = {id(tensor): tensor for tensor in tensors}
    packed, offsets = pack(list(unique.values()), pin_memory=True)
    buffer = packed.to(device, non_blocking=True)
    views = {key: unpack(buffer, offset, tensor) for offset, (key, tensor) in zip(offsets, unique.items(), strict=True)}
    return [views[id(tensor)] for tensor in tensors]


def pack(tensors: Sequence[Tensor], *, pin_memory: bool) -> tuple[Tensor, list[int]]:
    """Packs tensors into one buffer of bytes, uint8, and returns it with the offset of each tensor."""
    offsets, size = [], 0
    for tensor in tensors:
        offsets.append(size)
        size += -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT
    # torch reuses a pinned block only after the copies out of it are done.
    buffer = torch.empty(size, dtype=torch.uint8, pin_memory=pin_memory)
    for offset, tensor in zip(offsets, tensors, strict=True):
        unpack(buffer, offset, tensor).copy_(tensor)
    return buffer, offsets


def unpack(buffer: Tensor, offset: int, like: Tensor) -> Tensor:
    """Returns the part of a buffer at an offset as a tensor of the shape and dtype of ``like``."""
    size = like.numel() * like.element_size()
    return buffer[offset : offset + size].view(like.dtype).view(like.shape)


class HostCopy:
    """A copy of a tensor to the host, queued behind the work that computes the tensor. Later work does not delay it."""

    def __init__(self, tensor: Tensor) -> None:
        self._copy = tensor
        self._done: torch.cuda.Event | None = None
        if is_gpu(tensor.device):
            self._copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._copy.copy_(tensor, non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record()

    def read(self) -> list[float]:
        """Waits for the copy and returns its numbers."""
        if self._done is not None:
            self._done.synchronize()
        numbers: list[float] = self._copy.tolist()
        return numbers
