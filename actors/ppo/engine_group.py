"""Engines in training, sharded over Ray actors: what the critic's and the policy's groups have in common."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeAlias, TypeVar

import numpy as np
import ray
from numpy.typing import NDArray
from transformers import PreTrainedModel

from actors.runtime.rank_group import START_TIMEOUT_S, RankGroup, raise_write_errors
from rlhf_critic.algorithms.response_tokens import Masks
from rlhf_critic.batching.prefix_tree import TokenIds
from rlhf_critic.files import atomic_directory, verify_manifest, write_manifest

T = TypeVar("T")
GroupT = TypeVar("GroupT", bound="EngineGroup")


class EngineGroup:
    """Handle of an engine's ranks; a context manager that ends them.

    Calls may come from several threads and are made one after the other. When a rank is lost, the call that notices
    raises `RankLost` and the other ranks are ended.

    Args:
        options: Options of the engine.
        shards: Number of actors that the engine is sharded over.
        cpus_per_shard: CPUs that Ray reserves for each actor, and torch threads if there is no GPU.
        use_gpu: Whether each actor has a GPU and ranks use NCCL.
        start_timeout_s: Seconds to wait for room in the cluster, and for the shards to be built.
        call_timeout_s: Maximum seconds of a call.

    Raises:
        CriticError: The engine cannot be built, or the cluster has no room for it; nothing is left running.
    """

    what: ClassVar[str]
    rank_class: ClassVar[Any]  # a `Rank` with the methods build, save and load

    def __init__(
        self,
        options: Any,
        shards: int = 1,
        *,
        cpus_per_shard: float = 1.0,
        use_gpu: bool = False,
        start_timeout_s: float = START_TIMEOUT_S,
        call_timeout_s: float = 1800.0,
    ) -> None:
        self._ranks = RankGroup(
            self.what,
            self.rank_class,
            shards,
            cpus_per_rank=cpus_per_shard,
            use_gpu=use_gpu,
            start_timeout_s=start_timeout_s,
            call_timeout_s=call_timeout_s,
        )
        try:
            self._call(f"build the {self.what}", self.rank_class.build, options, timeout_s=start_timeout_s)
        except BaseException:
            self.shutdown()
            raise

    def _call(self, doing: str, method: Callable[..., T], *arguments: Any, timeout_s: float | None = None) -> list[T]:
        return self._ranks.call_all(doing, method.__name__, *arguments, timeout_s=timeout_s)

    def save(self, directory: str | Path, name: str = "") -> None:
        """Writes a Hugging Face model directory with what `load` needs.

        Args:
            directory: A directory that does not exist yet, reachable from every rank at this path; it appears
                atomically.
            name: Name of the critic, whose version is ``NAME@STEP``; not used for a policy.

        Raises:
            RankLost: A rank was lost.
            CheckpointError: The directory exists already, or cannot be written, which ends the group.
            ValueError: The state is offloaded.
        """
        with atomic_directory(directory) as building, raise_write_errors():
            self._call(f"save the {self.what}", self.rank_class.save, str(building.resolve()), name or self.what)
            write_manifest(building, 0, 1)

    def load(self, checkpoint: str | Path) -> None:
        """Resumes from what `save` wrote, with the same options and any number of shards.

        Raises:
            RankLost: A rank was lost.
            CheckpointError: The checkpoint is incomplete, damaged, or of another ZeRO stage.
            ValueError: The state is offloaded.
        """
        verify_manifest(checkpoint)
        self._call(f"load the {self.what}", self.rank_class.load, str(Path(checkpoint).resolve()))

    def shutdown(self) -> None:
        """Ends the ranks and frees what they had reserved; may be called again."""
        self._ranks.close()

    def __enter__(self: GroupT) -> GroupT:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()


class SharedSequences:
    """Token ids of rollouts that several calls and groups read, put into the object store once.

    A part of them, by `part`, refers to the same object. Where only one call reads token ids, a plain list does.

    Args:
        prompts: Token ids of whole sequences, or of prompts.
        responses: Token ids after each prompt, which the ranks join to it; None if there are none.

    Attributes:
        lengths: Number of tokens of each sequence.
    """

    def __init__(self, prompts: Sequence[TokenIds], responses: Sequence[TokenIds] | None = None) -> None:
        columns = [prompts] if responses is None else [prompts, responses]
        arrays = [[np.asarray(ids, dtype=np.int64) for ids in column] for column in columns]
        self.lengths = [sum(map(len, parts)) for parts in zip(*arrays, strict=True)]
        self._ref = ray.put(arrays)
        self._rows: list[int] | None = None

    def part(self, rows: Sequence[int]) -> SharedSequences:
        """Returns some of the sequences, which refer to the same object."""
        part = copy.copy(self)
        part.lengths = [self.lengths[row] for row in rows]
        part._rows = list(rows) if self._rows is None else [self._rows[row] for row in rows]
        return part

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def sent(self) -> tuple[ray.ObjectRef, list[int] | None]:
        """Arguments of a call of the ranks; see `received`."""
        return self._ref, self._rows


Sequences: TypeAlias = "Sequence[TokenIds] | SharedSequences"


def send(sequences: Sequences) -> tuple[ray.ObjectRef, list[int] | None]:
    """Returns the arguments of a call of the ranks; puts token ids into the object store if they are not there."""
    return (sequences if isinstance(sequences, SharedSequences) else SharedSequences(sequences)).sent


def only_lengths(sequences: Sequences) -> Sequence[TokenIds]:
    """Returns sequences of the same lengths for a check of these, without a copy of shared token ids."""
    return [range(length) for length in sequences.lengths] if isinstance(sequences, SharedSequences) else sequences


def received(columns: Sequence[Sequence[TokenIds]], rows: Sequence[int] | None) -> list[TokenIds]:
    """Returns, on a rank, the token ids of a call. Ray has replaced the reference by the object."""
    picked = range(len(columns[0])) if rows is None else rows
    if len(columns) == 1:
        return [columns[0][row] for row in picked]
    return [np.concatenate([column[row] for column in columns]) for row in picked]


def put_numbers(
    prompt_lengths: Sequence[int], masks: Masks | None, **numbers: Sequence[NDArray[np.floating]]
) -> ray.ObjectRef:
    """Puts prompt lengths, masks and numbers of every response token into the object store, for an update."""
    arrays = {name: [np.asarray(one, dtype=np.float32) for one in column] for name, column in numbers.items()}
    of_masks = None if masks is None else [np.asarray(mask, dtype=np.bool_) for mask in masks]
    return ray.put({"prompt_lengths": [int(length) for length in prompt_lengths], "masks": of_masks, **arrays})


def validate_token_ids(sequences: Sequence[TokenIds], model: PreTrainedModel) -> None:
    """Checks, with the same result on all ranks, that a model has an embedding for every token.

    Otherwise the lookup would fail on the one rank that makes it, and the group would end.

    Raises:
        ValueError: Names the first sequence with an unknown token id.
    """
    rows = model.config.get_text_config().vocab_size
    for index, ids in enumerate(sequences):
        if len(ids) and not 0 <= np.min(ids) <= np.max(ids) < rows:
            raise ValueError(
                f"sequence {index}: token ids from {np.min(ids)} to {np.max(ids)}, but the model has those from 0 to "
                f"{rows - 1}: encode it with the model's own tokenizer"
            )
