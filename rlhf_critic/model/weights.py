"""Weights: reads and writes named tensors in files, for the parameters of a module at any ZeRO stage.

Tensors are processed one at a time. Under ZeRO-3 a parameter is gathered, copied and partitioned again before the next
one, so no rank ever holds the full model. Nothing is skipped silently: one error counts all keys that are missing,
unexpected or of another shape, and lists ten. Knows nothing about heads, tokenizers or training.
"""

from __future__ import annotations

import itertools
import json
import zipfile
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.distributed as dist
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME, cached_file

from rlhf_critic.errors import CheckpointError
from rlhf_critic.model.file_layout import FileLayout, Source
from rlhf_critic.model.hf_config import reject_other_kinds
from rlhf_critic.model.lora import adapter_parameters, adapters_of, merged

LISTED_PROBLEMS = 10  # of one error; a large model has thousands of keys


class WeightReader:
    """Reader of named tensors in a model directory or hub id, one at a time.

    It prefers safetensors, single or split. Otherwise it reads a legacy ``pytorch_model.bin`` with
    ``weights_only=True``, which runs no code.

    Args:
        name_or_path: A directory or hub id.
        safetensors_only: Whether to reject all pickle files, including weights-only ones.

    Raises:
        CheckpointError: There are no weights, or a file is damaged or missing.
    """

    def __init__(self, name_or_path: str, *, safetensors_only: bool = False) -> None:
        self.source = name_or_path
        self._safetensors_only = safetensors_only
        self._place_of: dict[str, tuple[Path, str]] = {}  # file and key of each tensor
        self._open_files: dict[Path, Any] = {}  # an open safetensors file, or a dict of tensors
        names = (SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME)
        first = next(filter(None, map(partial(cached_file_of, name_or_path), names)), None)
        if first is None:
            reject_other_kinds(name_or_path)
            raise CheckpointError(
                f"{name_or_path}: no weights: neither {SAFE_WEIGHTS_NAME} nor {WEIGHTS_NAME} was found, single or "
                "split. Use a directory that save_pretrained wrote, or a hub id that can be reached."
            )
        self._add_listed_files(first) if first.suffix == ".json" else self._add_file(first)

    def _add_listed_files(self, index: Path) -> None:
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"{index}: damaged, or not an index of weights: {error}") from error
        for name in names:
            path = cached_file_of(self.source, name)
            if path is None:
                raise CheckpointError(f"{self.source}: {name} is missing, but {index.name} lists it")
            self._add_file(path)

    def _add_file(self, path: Path) -> None:
        if self._safetensors_only and path.suffix != ".safetensors":
            raise CheckpointError(
                f"{path}: a pickle file, but a critic's weights are read from safetensors only: save the model again, "
                "or convert it with rlhf-critic export DIRECTORY OUT"
            )
        try:
            opened = safe_open(str(path), framework="pt") if path.suffix == ".safetensors" else _unpickled(path)
        except UnpicklingError as error:
            raise CheckpointError(f"{path}: rejected, because it holds more than weights: {error}") from error
        except (SafetensorError, OSError, RuntimeError, ValueError, EOFError) as error:
            raise CheckpointError(f"{path}: damaged, or not a weights file: {error}") from error
        self._open_files[path] = opened
        keys = opened.keys()
        self._place_of.update({key: (path, key) for key in keys})

    def add_if_there(self, name: str) -> bool:
        """Adds the tensors of a further file of the directory, if it has this file; returns whether it has.

        Raises:
            CheckpointError: The file is damaged.
        """
        path = cached_file_of(self.source, name)
        if path is not None:
            self._add_file(path)
        return path is not None

    @property
    def files(self) -> list[Path]:
        """Files that hold the tensors, sorted by name."""
        return sorted(self._open_files)

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._place_of)

    def shape(self, name: str) -> torch.Size:
        """Returns the shape of a tensor without reading it."""
        path, key = self._place_of[name]
        opened = self._open_files[path]
        return opened[key].shape if isinstance(opened, dict) else torch.Size(opened.get_slice(key).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Returns the dtype of a tensor without reading it."""
        path, key = self._place_of[name]
        opened = self._open_files[path]
        if isinstance(opened, dict):
            return opened[key].dtype
        return opened.get_slice(key)[:0].dtype  # an empty part

    def read(self, name: str) -> Tensor:
        """Reads one tensor to the CPU."""
        path, key = self._place_of[name]
        opened = self._open_files[path]
        return opened[key] if isinstance(opened, dict) else opened.get_tensor(key)

    def pop(self, name: str) -> Tensor:
        """Reads one tensor to the CPU and removes it from `names`."""
        tensor = self.read(name)
        del self._place_of[name]
        return tensor

    def replace(self, name: str, tensor: Tensor) -> None:
        """Replaces a tensor by another one, which stays in memory."""
        place = Path(f"{name} in memory")
        self._open_files[place] = {name: tensor}
        self._place_of[name] = (place, name)

    def rename(self, new_name: Callable[[str], str]) -> None:
        """Renames every tensor.

        Raises:
            CheckpointError: Two tensors would have the same name.
        """
        renamed: dict[str, tuple[Path, str]] = {}
        for name, place in self._place_of.items():
            new = new_name(name)
            if new in renamed:
                raise CheckpointError(f"{self.source}: {renamed[new][1]} and {name} are both the weight {new}")
            renamed[new] = place
        self._place_of = renamed


def cached_file_of(name_or_path: str, name: str) -> Path | None:
    """Returns a file of a directory or hub id, downloaded if necessary; None if there is none or no connection."""
    found = cached_file(
        name_or_path,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    return None if found is None else Path(found)


def _unpickled(path: Path) -> dict[str, Tensor]:
    # Files from before torch 1.6 are not zip archives and cannot be memory-mapped.
    tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    entries = tensors.items() if isinstance(tensors, dict) else [("the file", tensors)]
    others = [f"{key}: {type(value).__name__}" for key, value in entries if not isinstance(value, Tensor)]
    if others:
        raise CheckpointError(
            f"{path}: rejected, because it holds more than named weights ({', '.join(others[:5])}); save only the "
            "model's state_dict()"
        )
    return tensors


def gathered(parameter: Tensor, modify: bool = False) -> AbstractContextManager[Any]:
    """Gathers a ZeRO-3 parameter within the block; does nothing to a parameter that is not partitioned.

    Every rank must enter. With ``modify``, rank 0's writes become the parameter on all ranks.
    """
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0 if modify else None)


def is_writer(parameter: Tensor) -> bool:
    """Returns whether this rank should write into a parameter inside ``gathered(parameter, modify=True)``."""
    return not hasattr(parameter, "ds_id") or dist.get_rank() == 0


def full_shape(parameter: Tensor) -> torch.Size:
    """Returns the shape of the full parameter, even if this rank holds only a shard."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def persistent_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Returns parameters and persistent buffers by their names in the module's state dict; shared ones once."""
    in_state_dict = set(module.state_dict(keep_vars=True))
    named = [*module.named_parameters(), *module.named_buffers()]
    return {name: tensor for name, tensor in named if name in in_state_dict}


def match_weights(
    module: nn.Module,
    reader: WeightReader,
    *,
    prefix: str,
    may_be_missing: Callable[[str], bool],
    may_be_unexpected: Callable[[str], bool],
    may_have_fewer_rows: Callable[[str], bool],
) -> dict[str, Source]:
    """Matches the tensors of a module with those of a file by name and shape, without reading them.

    Args:
        module: The module to load; it may be on the meta device.
        reader: The reader of the file.
        prefix: Name of the backbone within the module (``"model."``). Keys also match if only the file or only the
            module has this prefix.
        may_be_missing: Whether a name of the module may be absent from the file. It is then left unchanged.
        may_be_unexpected: Whether a name of the file may be absent from the module.
        may_have_fewer_rows: Whether a tensor of the file may be shorter in its first dimension, as an embedding is
            before the vocabulary is padded. The missing rows become zero.

    Returns:
        The source in the file of each tensor of the module that the file has.

    Raises:
        CheckpointError: Keys do not match; counts the missing, unexpected and mis-shaped keys, and lists some.
    """
    targets = persistent_tensors(module)

    def name_in_module(key: str) -> str:
        """Adds or removes the prefix, which a file of the bare backbone lacks."""
        candidates = (key, f"{prefix}{key}", key.removeprefix(prefix))
        return next((name for name in candidates if name in targets), key)

    source_of: dict[str, Source] = {}
    problems: defaultdict[str, list[str]] = defaultdict(list)
    quantised: defaultdict[str, list[str]] = defaultdict(list)
    for found_name, source in FileLayout(module).sources(reader.names):
        first = source_of.setdefault(name_in_module(found_name), source)
        if first != source:
            problems["twice"].append(f"{first.keys[0]} and {source.keys[0]}")
    missing = {name for name in targets if name not in source_of}
    problems["missing"] = [name for name in sorted(missing) if not may_be_missing(name)]
    problems["unexpected"] = [
        source.keys[0]
        for name, source in source_of.items()
        if name not in targets and not may_be_unexpected(source.keys[0])
    ]
    for name in targets.keys() & source_of.keys():
        source, wanted = source_of[name], full_shape(targets[name])
        try:
            found = source.convert(lambda key: torch.empty(reader.shape(key), device="meta")).shape
        except (RuntimeError, ValueError, KeyError) as error:
            problems["experts"].append(f"{name}: {len(source.keys)} entries of the file do not make it: {error}")
            continue
        shorter = found[1:] == wanted[1:] and found[0] < wanted[0] and may_have_fewer_rows(name)
        if found != wanted and not shorter:
            problems["shape"].append(f"{name}: {tuple(found)} in the file, {tuple(wanted)} in the model")
        elif (dtype := reader.dtype(source.keys[0])).itemsize == 1 and targets[name].is_floating_point():
            quantised[str(dtype).removeprefix("torch.")].append(name)
    for kind, names in quantised.items():
        problems["quantised"].append(
            f"{len(names)} tensors are {kind}, such as {names[0]}: they are numbers without their scales. "
            "Dequantise the model and save it in bfloat16 or float32"
        )
    if any(problems.values()):
        raise CheckpointError(f"{reader.source}: the weights do not fit the model:\n  {_listed(problems)}")
    return {name: source for name, source in source_of.items() if name in targets}


def _listed(problems: dict[str, list[str]]) -> str:
    """Returns a line for each problem, at most `LISTED_PROBLEMS`, and for the number of others of each kind."""
    kinds = {kind: sorted(places) for kind, places in problems.items() if places}
    shown = max(1, LISTED_PROBLEMS // len(kinds))
    lines = []
    for kind, places in kinds.items():
        lines += [f"{kind}: {place}" for place in places[:shown]]
        if len(places) > shown:
            lines.append(f"{kind}: and {len(places) - shown} more")
    return "\n  ".join(lines)


def load_weights(module: nn.Module, reader: WeightReader, **tolerances: Any) -> set[str]:
    """Copies a file's tensors into a module of any ZeRO stage. Under ZeRO-3 all ranks must call.

    Returns:
        The names in the module that the file did not have.

    Raises:
        CheckpointError: See `match_weights`.
    """
    source_of = match_weights(module, reader, **tolerances)
    targets = persistent_tensors(module)
    for name, tensor in targets.items():
        if name not in source_of:
            continue
        with torch.no_grad(), gathered(tensor, modify=True):
            if is_writer(tensor):
                source = source_of[name].convert(reader.read)
                tensor[: len(source)].copy_(source) if source.dim() else tensor.copy_(source)
                if source.dim():
                    tensor[len(source) :].zero_()
    return targets.keys() - source_of.keys()


def save_weights(module: nn.Module, directory: Path, is_main: bool) -> None:
    """Writes a module's weights as safetensors, file by file, split as on the Hugging Face hub.

    Adapters are merged into their weights, one weight at a time, so the file is that of a model without adapters. Names
    are those that every version of transformers reads; see `rlhf_critic.model.file_layout`.
    Under ZeRO-3 all ranks must call. Ranks that are not ``is_main`` take part in gathering and keep nothing.
    """
    layers = adapters_of(module)
    adapting = {id(parameter) for layer in layers.values() for parameter in adapter_parameters(layer)}
    tensors, layer_of = {}, {}
    for name, tensor in persistent_tensors(module).items():
        if id(tensor) not in adapting:
            plain = name.replace(".base_layer.", ".")
            tensors[plain] = tensor
            layer_of[plain] = layers.get(name)
    layout = FileLayout(module)
    entries: dict[str, Tensor] = {}  # of the files, without memory
    tensor_of: dict[str, str] = {}  # name of the tensor that an entry is made of
    for plain, tensor in tensors.items():
        shape_only = torch.empty(full_shape(tensor), dtype=tensor.dtype, device="meta")
        made = layout.to_file(plain, shape_only)
        entries.update(made)
        tensor_of.update(dict.fromkeys(made, plain))
    split = split_state_dict_into_shards_factory(
        entries,
        get_storage_size=lambda entry: entry.numel() * entry.element_size(),
        filename_pattern="model{suffix}.safetensors",
        max_shard_size="5GB",
    )
    for filename, names in split.filename_to_tensors.items():
        in_file: dict[str, Tensor] = {}
        for plain, of_tensor in itertools.groupby(names, key=tensor_of.__getitem__):
            layer = layer_of[plain]
            with ExitStack() as stack:
                for tensor in [tensors[plain], *(adapter_parameters(layer) if layer else [])]:
                    stack.enter_context(gathered(tensor))
                if is_main:
                    tensor = merged(tensors[plain], layer) if layer else tensors[plain].detach()
                    made = layout.to_file(plain, tensor)
                    for name in of_tensor:
                        in_file[name] = made[name].cpu().clone(memory_format=torch.contiguous_format)
        if is_main:
            save_file(in_file, directory / filename, metadata={"format": "pt"})
    if is_main and split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (directory / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True))
