"""The memory of a DeepSpeed engine, given back between the phases of PPO and taken again.

Scoring, generation and the fit of policy and critic take turns on the same devices (Hu et al., "OpenRLHF" (2024);
Sheng et al., "HybridFlow" (2024)); who waits keeps nothing there. What leaves is what the engine holds from one step to
the next: parameters, gradients, optimizer state and DeepSpeed's flat buffers, whatever the ZeRO stage. DeepSpeed 0.19's
own ``engine.offload_states`` knows stages 1 to 3 only, at stage 3 only with its own FusedAdam, and copies from CPU to
CPU where the device is the CPU.

Tensors and the views among them stay the objects they are: only the storages they share are emptied, as FSDP does with
its flat parameters (Zhao et al., "PyTorch FSDP" (2023)), so nothing has to know how DeepSpeed lays its buffers out.
Addresses change; a CUDA graph of the engine does not survive. Knows nothing of critics or of who waits for the memory.
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

MIN_BYTES = 4096  # a page; what is smaller, such as Adam's step counts, frees nothing


def offload(engine: Any, others: Iterable[Tensor] = (), directory: str | Path | None = None) -> Offloaded:
    """Empties the device memory of one rank's DeepSpeed engine.

    Not collective: each rank moves what it holds. Call it between steps. From a GPU the bytes go to pinned CPU memory
    (not yet run on a GPU); where the device is the CPU they go to a file without a name, which the system removes when
    it is closed, however that comes about.

    Until `Offloaded.restore`, a forward pass raises `CriticError`; anything else that reads the engine's tensors, such
    as saving, reads memory that is not there and may end the process.

    Args:
        engine: What ``deepspeed.initialize`` returned, with an optimizer or without.
        others: Tensors on the engine's device that leave with it, such as a gradient kept outside of it.
        directory: Where the file is made: on a disk, because a file in a tmpfs is memory again. None is the system's
            directory for temporary files.

    Returns:
        What was moved. It holds the only copy: dropped before it is restored, the engine's state is lost.

    Raises:
        OSError: The file has no room. The engine is as it was.
    """
    return Offloaded(engine, others, directory)


class Offloaded:
    """The state of an engine while it is away; see `offload`.

    Attributes:
        bytes: What left the device on this rank: each storage once, those under a page and those that torch cannot
            resize (it shares them with numpy or with a mapped file) not at all, because they stay.
    """

    def __init__(self, engine: Any, others: Iterable[Tensor], directory: str | Path | None) -> None:
        from deepspeed.accelerator import get_accelerator

        get_accelerator().synchronize()  # DeepSpeed reduces gradients on streams of its own
        self._storages = list(_storages(engine, others))
        self._sizes = [storage.nbytes() for storage in self._storages]
        self.bytes = sum(self._sizes)
        self._file = TemporaryFile(dir=directory) if engine.device.type == "cpu" else None  # noqa: SIM115
        self._copies: list[Tensor] = []  # where there is no file
        for storage in self._storages:
            if self._file:
                self._file.write(_memory(storage))
            else:
                copy = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=True)
                self._copies.append(copy.copy_(_as_bytes(storage)))
        if self._file:
            self._file.flush()
        # All are copied before the first is emptied, so that a full disk costs nothing.
        for storage in self._storages:
            storage.resize_(0)
        _release_freed_memory()
        self._guard = engine.module.register_forward_pre_hook(_refuse_forward, prepend=True)

    def restore(self) -> None:
        """Brings everything back, bit for bit; a second call does nothing."""
        if self._file:
            self._file.seek(0)
        for index, (storage, size) in enumerate(zip(self._storages, self._sizes, strict=True)):
            storage.resize_(size)
            if not self._file:
                _as_bytes(storage).copy_(self._copies[index])
            elif self._file.readinto(_memory(storage)) != size:
                raise CriticError("the file of an offloaded engine is shorter than what was written: its disk failed")
        if self._file:
            self._file.close()
        self._file, self._storages, self._sizes, self._copies = None, [], [], []
        self._guard.remove()


def _storages(engine: Any, others: Iterable[Tensor]) -> Iterator[torch.UntypedStorage]:
    """Each storage worth moving that parameters, optimizers and ``others`` hold on the engine's device, once."""
    todo: list[Any] = [*engine.module.parameters(), *others]
    optimizer = engine.optimizer  # DeepSpeed's, around torch's; or torch's itself; or none
    while optimizer is not None:
        todo.extend(vars(optimizer).values())
        optimizer = getattr(optimizer, "optimizer", None)
    seen: dict[int, Any] = {}  # by id; held, so that no id is given to another object meanwhile
    addresses: set[int] = set()
    while todo:
        item = todo.pop()
        if id(item) in seen:
            continue
        seen[id(item)] = item
        if isinstance(item, Tensor):
            # DeepSpeed hangs a parameter's shard (`ds_tensor`) and gathered gradients on it as attributes.
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


def _release_freed_memory() -> None:
    """Gives the system what the allocators below torch keep for reuse when a storage is freed."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().empty_cache()
    if sys.platform == "linux":
        # glibc keeps freed blocks of up to 32 MB (M_MMAP_THRESHOLD grows to that) in its heap, and with them most of a
        # model; other C libraries have no such function.
        malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if malloc_trim:
            malloc_trim(0)


def _memory(storage: torch.UntypedStorage) -> ctypes.Array[ctypes.c_char]:
    """A storage on the CPU as a buffer. Not by way of numpy: torch never again resizes what it shared with numpy."""
    return (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())


def _as_bytes(storage: torch.UntypedStorage) -> Tensor:
    """A storage on any device as a tensor of bytes."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _refuse_forward(module: nn.Module, inputs: Any) -> None:
    raise CriticError("the engine is offloaded: call restore() of what offload() returned before the next pass")
