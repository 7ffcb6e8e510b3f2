"""Offloading of a DeepSpeed engine: frees its device memory between the phases of PPO and restores it.

Scoring, generation and the training of policy and critic take turns on the same devices (Hu et al., "OpenRLHF" (2024);
Sheng et al., "HybridFlow" (2024)). An idle engine keeps nothing there. Offloaded is all that the engine holds between
steps at any ZeRO stage: parameters, gradients, optimizer state and DeepSpeed's flat buffers. DeepSpeed 0.19's own
``engine.offload_states`` supports stages 1 to 3 only, at stage 3 only with its own FusedAdam. If the device is the CPU,
it copies from CPU to CPU.

Tensors and their views remain the same objects. Only the storages they share are emptied, as FSDP does with its flat
parameters (Zhao et al., "PyTorch FSDP" (2023)). So this module does not depend on the layout of DeepSpeed's buffers.
Addresses change; a CUDA graph of the engine does not survive. Knows nothing about critics or the users of the memory.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable, Iterator
from dataclasses import is_dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_critic.errors import CriticError

MIN_BYTES = 4096  # a page; smaller storages, such as Adam's step counts, free nothing


class Offloaded:
    """The state of one rank's DeepSpeed engine, moved off its device.

    Not collective: each rank moves its own memory. Make it between steps. From a GPU the bytes go to pinned CPU memory.
    If the device is the CPU, they go to an unnamed file, which the system removes when it is closed or the process
    ends. It holds the only copy: if it is dropped before it is restored, the state is lost.

    Until `restore`, a forward pass raises `CriticError`. Anything else that reads the engine's tensors, such as saving,
    reads freed memory and may end the process.

    Args:
        engine: The engine that ``deepspeed.initialize`` returned, with or without an optimizer.
        others: Further tensors on the engine's device to offload, such as a gradient kept outside the engine.
        directory: Directory of the file. It must be on a disk, because a file in a tmpfs is in memory. None uses the
            system's directory for temporary files.

    Attributes:
        bytes: Bytes moved off the device on this rank. Each storage counts once. Storages under a page stay, and so do
            those that torch cannot resize because it shares them with numpy or a mapped file.

    Raises:
        OSError: The disk has no room for the file. The engine is unchanged.
    """

    def __init__(self, engine: Any, others: Iterable[Tensor] = (), directory: str | Path | None = None) -> None:
        from deepspeed.accelerator import get_accelerator

        get_accelerator().synchronize()  # DeepSpeed reduces gradients on its own streams
        self._storages = list(_storages(engine, others))
        self._sizes = [storage.nbytes() for storage in self._storages]
        self.bytes = sum(self._sizes)
        self._file = TemporaryFile(dir=directory) if engine.device.type == "cpu" else None  # noqa: SIM115
        self._copies: list[Tensor] = []  # used if there is no file
        for storage in self._storages:
            if self._file:
                self._file.write(_memory(storage))
            else:
                copy = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=True)
                self._copies.append(copy.copy_(_as_bytes(storage)))
        if self._file:
            self._file.flush()
        # All are copied before the first is emptied, so a full disk leaves the engine unchanged.
        for storage in self._storages:
            storage.resize_(0)
        get_accelerator().empty_cache()
        # glibc keeps freed blocks of up to 32 MB (M_MMAP_THRESHOLD grows to that) in its heap, which is most of a
        # model. Other C libraries have no such function.
        if sys.platform == "linux" and (malloc_trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
            malloc_trim(0)
        self._guard = engine.module.register_forward_pre_hook(_reject_forward, prepend=True)

    def restore(self) -> None:
        """Restores everything bit for bit; a second call does nothing."""
        if self._file:
            self._file.seek(0)
        for index, (storage, size) in enumerate(zip(self._storages, self._sizes, strict=True)):
            storage.resize_(size)
            if not self._file:
                _as_bytes(storage).copy_(self._copies[index])
            elif self._file.readinto(_memory(storage)) != size:
                raise CriticError("the file of an offloaded engine is shorter than what was written; check its disk")
        if self._file:
            self._file.close()
        self._file, self._storages, self._sizes, self._copies = None, [], [], []
        self._guard.remove()


def _storages(engine: Any, others: Iterable[Tensor]) -> Iterator[torch.UntypedStorage]:
    """Yields each storage of a page or more that parameters, optimizers and ``others`` hold on the engine's device."""
    todo: list[Any] = [*engine.module.parameters(), *others]
    optimizer = engine.optimizer  # DeepSpeed's around torch's, torch's alone, or none
    while optimizer is not None:
        todo.extend(vars(optimizer).values())
        optimizer = getattr(optimizer, "optimizer", None)
    seen: dict[int, Any] = {}  # by id; references are kept so that no id is reused meanwhile
    addresses: set[int] = set()
    while todo:
        item = todo.pop()
        if id(item) in seen:
            continue
        seen[id(item)] = item
        if isinstance(item, Tensor):
            # DeepSpeed stores a parameter's shard (`ds_tensor`) and gathered gradients as its attributes.
            todo.extend(vars(item).values())
            if item.is_leaf:
                todo.append(item.grad)
            if item.layout is not torch.strided or item.device.type != engine.device.type:
                continue
            storage = item.untyped_storage()
            if storage.nbytes() >= MIN_BYTES and storage.resizable() and storage.data_ptr() not in addresses:
                addresses.add(storage.data_ptr())
                yield storage
        elif isinstance(item, dict):
            todo.extend([*item.keys(), *item.values()])
        elif isinstance(item, (list, tuple, set, frozenset)):
            todo.extend(item)
        elif is_dataclass(item) and not isinstance(item, type):  # DeepSpeed's communication buckets
            todo.extend(vars(item).values())


def _memory(storage: torch.UntypedStorage) -> ctypes.Array[ctypes.c_char]:
    """Returns a storage on the CPU as a buffer. Avoids numpy, because torch cannot resize what it shared with numpy."""
    return (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())


def _as_bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _reject_forward(module: nn.Module, inputs: Any) -> None:
    raise CriticError("the engine is offloaded: call restore() of what offload() returned before the next forward pass")
