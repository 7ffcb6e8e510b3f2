"""Layout of weights in files, where it differs from the tensors of a model, by transformers' own table.

Files of mixtures of experts have matrices for each expert, which transformers 4 and vLLM read. Models of transformers 5
have one tensor for all experts of a layer. Both directions process the tensors of one layer at a time. Knows nothing
about files, shards or training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightConverter, WeightRenaming, dot_natural_key


@dataclass(frozen=True)
class Source:
    """Entries of a file that make one tensor of a model.

    Attributes:
        keys: Names of the entries in the file, in order.
        convert: Makes the tensor of the entries; it gets a function that returns an entry by its name.
    """

    keys: tuple[str, ...]
    convert: Callable[[Callable[[str], Tensor]], Tensor]


class FileLayout:
    """Conversion between the tensors of a model and the entries of its files.

    Args:
        model: The model; it may be on the meta device. A module of another kind has the layout of its files.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model: Any = model
        table = get_model_conversion_mapping(model, add_legacy=False) if isinstance(model, PreTrainedModel) else []
        self._renamings = [entry for entry in table if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in table if isinstance(entry, WeightConverter)]
        # Transformers writes files in the same way. A change of prefix has no inverse: files have either.
        self._to_renamings = [
            entry.reverse_transform() for entry in reversed(self._renamings) if not isinstance(entry, PrefixChange)
        ]
        # Files may also have the names of the model. So what would join several tensors again is left as it is.
        self._to_converters = [
            entry.reverse_transform() for entry in reversed(self._converters) if len(entry.target_patterns) == 1
        ]

    def sources(self, keys: Iterable[str]) -> list[tuple[str, Source]]:
        """Returns the names in the model that the entries of a file make, each with its source.

        An entry that the table does not name keeps its name. A name occurs twice if two sources make it.
        """
        if not self._converters and not self._renamings:
            return [(key, _unchanged(key)) for key in keys]
        made: list[tuple[str, Source]] = []
        groups: dict[tuple[str, int], list[tuple[str, str]]] = {}
        for key in sorted(keys, key=dot_natural_key):  # experts in the order of their numbers
            name = _renamed(key, self._renamings)
            for number, converter in enumerate(self._converters):
                target, pattern = converter.rename_source_key(name)
                if pattern is not None:
                    groups.setdefault((target, number), []).append((key, pattern))
                    break
            else:
                made.append((name, _unchanged(key)))
        for (target, number), entries in groups.items():
            made += self._converted(target, self._converters[number], entries)
        return made

    def _converted(
        self, target: str, converter: WeightConverter, entries: list[tuple[str, str]]
    ) -> list[tuple[str, Source]]:
        def convert(read: Callable[[str], Tensor]) -> dict[str, Tensor]:
            one = deepcopy(converter)
            for key, pattern in entries:
                one.add_tensor(target, key, pattern, read(key))
            return {
                name: _only(tensor) for name, tensor in one.convert(target, self._model, self._model.config).items()
            }

        keys = tuple(key for key, _ in entries)
        if len(converter.target_patterns) == 1:
            return [(target, Source(keys, lambda read: next(iter(convert(read).values()))))]
        parts = [target.replace(converter.target_patterns[0], part) for part in converter.target_patterns]
        return [(part, Source(keys, partial(_part_of, convert, part))) for part in parts]

    def to_file(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """Converts a tensor of the model to the entries of a file, by their names. They may be views of the tensor."""
        for converter in self._to_converters:
            target, pattern = converter.rename_source_key(name)
            if pattern is not None:
                one = deepcopy(converter)
                one.add_tensor(target, name, pattern, tensor)
                made = one.convert(target, self._model, self._model.config)
                return {_renamed(key, self._to_renamings): _only(entry) for key, entry in made.items()}
        return {_renamed(name, self._to_renamings): tensor}


def _part_of(
    convert: Callable[[Callable[[str], Tensor]], dict[str, Tensor]], part: str, read: Callable[[str], Tensor]
) -> Tensor:
    return convert(read)[part]


def _unchanged(key: str) -> Source:
    return Source((key,), lambda read: read(key))


def _renamed(name: str, renamings: list[WeightRenaming]) -> str:
    for renaming in renamings:
        name, _ = renaming.rename_source_key(name)
    return name


def _only(tensor: Tensor | list[Tensor]) -> Tensor:
    return tensor if isinstance(tensor, torch.Tensor) else tensor[0]
