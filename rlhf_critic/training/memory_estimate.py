"""What a shard of a critic in training holds, part by part: calculated, without weights and without a device.

`count_model` counts a model on the meta device. `activation_bytes` runs it there, over tensors that have shapes and no
memory, so that activations are counted by the code that trains, whatever the family. `shard_memory` says what
DeepSpeed 0.19 holds of it, read from its source and held to measured bytes by tests.

DeepSpeed's own ``estimate_zero2_model_states_mem_needs`` and ``estimate_zero3_model_states_mem_needs`` do not serve:
they know 16-bit weights only, charge 6 bytes of gradients for each parameter at all times, where 2 are held between
micro-batches, multiply what they are not sure of by 1.5, and know neither stages 0 and 1, nor frozen weights, nor
buckets, nor activations.

Knows nothing of GPUs, clusters or allocators: what a CUDA context and fragmentation take comes on top.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlhf_critic.config.deepspeed import deepspeed_config
from rlhf_critic.config.model import BodyConfig, OptimizerConfig
from rlhf_critic.model.critic import Critic

FP32_BYTES = 4
ADAM_BYTES = 8  # two moments in fp32
WORKING_BYTES = {"float32": 4, "bfloat16": 2}
# Defaults of DeepSpeed 0.19 that `deepspeed_config` leaves alone, in elements.
PERSISTENT = 100_000  # stage3_param_persistence_threshold: smaller parameters stay whole once they were gathered
MOST_GATHERED = 1_000_000_000  # stage3_max_live_parameters: others stay gathered up to this many
ALL_REDUCE = 500_000_000  # MEMORY_OPT_ALLREDUCE_SIZE: stage 0 flattens so many gradients at once


@dataclass(frozen=True)
class ModelCount:
    """The sizes of a model's parameters, in elements; what is shared counts once.

    Attributes:
        trained: Of each parameter that is trained.
        frozen: Of each that is not.
        largest: The largest trained one but for the input embedding, whose gradient comes when no activation is left.
        largest_of_all: The largest trained one.
    """

    trained: tuple[int, ...]
    frozen: tuple[int, ...]
    largest: int
    largest_of_all: int

    @property
    def parameters(self) -> int:
        """All of them."""
        return sum(self.trained) + sum(self.frozen)


@dataclass(frozen=True)
class ShardMemory:
    """Bytes on each rank.

    Attributes:
        parameters: Weights in the dtype of training: at stage 3 this rank's part and the small ones, which stay whole.
        gradients: What is held from one micro-batch to the next.
        masters: The optimizer's own fp32 copy of what it updates.
        moments: AdamW's.
        buckets: Buffers that gradients are reduced in while the backward pass runs.
        gathered: Whole parameters that stage 3 keeps at hand while it computes.
        activations: See `activation_bytes`.
        reduction: Buffers at the end of the backward pass, when no activation is left.
        step: All gradients while the optimizer takes its step, its fp32 copy included.
        host: In the memory of the CPUs, by offloading.
    """

    parameters: int
    gradients: int
    masters: int
    moments: int
    buckets: int
    gathered: int
    activations: int
    reduction: int
    step: int
    host: int

    @property
    def states(self) -> int:
        """Parameters, gradients and optimizer state: what is there whatever the batch."""
        return self.parameters + self.gradients + self.masters + self.moments

    @property
    def peak(self) -> int:
        """The most at any time: in the backward pass, at its end, or in the optimizer's step.

        Counts all activations beside all gradients of a micro-batch's, though the one goes as the other comes.
        """
        backward = self.gradients + self.buckets + self.gathered + self.activations
        return self.parameters + self.masters + self.moments + max(backward, self.gradients + self.reduction, self.step)


def count_model(critic: Critic) -> ModelCount:
    """Counts a critic, on any device, that is not partitioned."""
    trained = tuple(parameter.numel() for parameter in critic.parameters() if parameter.requires_grad)
    frozen = tuple(parameter.numel() for parameter in critic.parameters() if not parameter.requires_grad)
    embedding = {id(parameter) for parameter in critic.model.get_input_embeddings().parameters()}
    others = [p.numel() for p in critic.parameters() if p.requires_grad and id(p) not in embedding]
    return ModelCount(trained, frozen, max(others, default=0), max(trained, default=0))


class _LiveBytes(TorchDispatchMode):
    """Follows every storage that is made while it is on, until nobody holds it any more.

    Args:
        known: Tensors whose storages were there before.

    Attributes:
        peak: The most bytes of such storages at any time.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.peak = self._live = 0
        # Not by address: on the meta device all storages are at address 0.
        self._seen = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            if isinstance(made, Tensor):
                self._follow(made.untyped_storage())
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self._live += size
        self.peak = max(self.peak, self._live)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self._live -= size


def activation_bytes(
    critic: Critic, tokens: int, length: int, *, gradient_checkpointing: bool, rewards_only: bool = True
) -> int:
    """The most memory that a forward and a backward pass over a micro-batch take beside parameters and gradients.

    That is what the forward pass keeps (with gradient checkpointing the input of every layer: Chen et al., "Training
    deep nets with sublinear memory cost" (2016)), what the backward pass computes again, and what operators hand to
    each other on the way, a weight's gradient until it is added to the others included. What a kernel uses inside is
    not. Attention is that of CPUs; flex attention, on GPUs, keeps the same tensors.

    Args:
        critic: On the meta device, as it is trained: in its dtype, with its adapters and what is frozen.
        tokens: That are computed: the token budget of a micro-batch.
        length: Most tokens of a sequence. Sequences share nothing here.
        gradient_checkpointing: See above.
        rewards_only: Whether the loss reads rewards only, which spares most of the last layer.
    """
    sequences = [np.full(min(length, tokens - start), row) for row, start in enumerate(range(0, tokens, length))]
    batch = critic.batch_of(sequences, "meta")
    critic.train()
    if gradient_checkpointing:
        critic.gradient_checkpointing_enable()
    else:
        critic.gradient_checkpointing_disable()
    trained = [parameter for parameter in critic.parameters() if parameter.requires_grad]
    hooks = [parameter.register_post_accumulate_grad_hook(_drop_gradient) for parameter in trained]
    with torch.enable_grad(), _LiveBytes([*critic.parameters(), *critic.buffers()]) as live:
        critic(batch, rewards_only=rewards_only).sum().backward()
    for hook in hooks:
        hook.remove()
    return live.peak


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def shard_memory(
    count: ModelCount, model: BodyConfig, options: OptimizerConfig, world_size: int, activations: int = 0
) -> ShardMemory:
    """What each rank holds.

    Shards: Rajbhandari et al., "ZeRO: memory optimizations toward training trillion parameter models" (2020). What is
    held beside them is read from DeepSpeed 0.19's ``zero/stage_1_and_2.py``, ``zero/stage3.py``,
    ``fp16/unfused_optimizer.py`` (stage 0 in bf16) and ``engine.py``.

    Args:
        count: Of the whole model.
        model: Gives the dtype.
        options: Give the ZeRO stage and what is offloaded.
        world_size: Number of ranks.
        activations: Bytes; see `activation_bytes`.
    """
    working = WORKING_BYTES[model.dtype]
    trained, stage = sum(count.trained), options.zero_stage
    if stage == 0:
        return _whole(count, working, world_size, activations)

    def part(sizes: tuple[int, ...]) -> int:
        """Elements of a rank: stage 3 divides every parameter, the others all of them together."""
        return sum(-(-size // world_size) for size in sizes) if stage == 3 else -(-sum(sizes) // world_size)

    shard = part(count.trained)
    bucket = deepspeed_config(model, options)["zero_optimization"]["reduce_bucket_size"]

    filled = min(bucket, trained)
    oversize = count.largest_of_all if count.largest_of_all > bucket else 0
    memory = ShardMemory(
        parameters=working * count.parameters,
        # Stage 1 reduces them once the last micro-batch is done, stage 2 adds each micro-batch's part to what it has.
        gradients=working * (trained if stage == 1 else shard),
        masters=FP32_BYTES * shard,
        moments=ADAM_BYTES * shard,
        # What is in the bucket is flattened once more to be reduced; so is a gradient that is larger than a bucket.
        buckets=working * (bucket if stage == 1 else bucket + max(filled, count.largest)),
        gathered=0,
        activations=activations,
        reduction=working * (bucket + max(filled, count.largest_of_all) + oversize),
        # As they were added up, flattened, and in bf16 as fp32.
        step=shard * (2 * working + (FP32_BYTES if working < FP32_BYTES else 0)),
        host=0,
    )
    if stage == 3:
        sizes = (*count.trained, *count.frozen)
        # One rank's part is the whole, so nothing is gathered, unless from the CPUs.
        gathered = sizes if world_size > 1 or options.offload_parameters else ()
        small = sum(size for size in gathered if size <= PERSISTENT)
        memory = replace(
            memory,
            parameters=working * (part(sizes) + small),
            gathered=working * min(sum(gathered) - small, MOST_GATHERED),
            step=memory.step + working * bucket,  # this bucket is never given back
        )
    return _offloaded(memory, count, options, working, shard, part(count.frozen))


def _whole(count: ModelCount, working: int, world_size: int, activations: int) -> ShardMemory:
    """Stage 0: all of it on every rank. In bf16 the optimizer has fp32 copies, of gradients during its step only."""
    trained = sum(count.trained)
    mixed = working < FP32_BYTES
    return ShardMemory(
        parameters=working * count.parameters,
        gradients=working * trained,
        masters=FP32_BYTES * trained if mixed else 0,
        moments=ADAM_BYTES * trained,
        buckets=0,
        gathered=0,
        activations=activations,
        reduction=working * min(trained, ALL_REDUCE) if world_size > 1 else 0,
        step=(working + (FP32_BYTES if mixed else 0)) * trained,
        host=0,
    )


def _offloaded(
    memory: ShardMemory, count: ModelCount, options: OptimizerConfig, working: int, shard: int, frozen_shard: int
) -> ShardMemory:
    """Moves to the CPUs what is offloaded."""
    if options.offload_optimizer:
        # Beside masters and moments the CPUs get gradients in fp32, for AdamW; from stage 2 on those of micro-batches
        # before the last; at stages 1 and 2 what goes back to the GPU, and there and here a buffer for one gradient.
        buffers = FP32_BYTES * shard
        if options.zero_stage > 1:
            buffers += working * shard
        if options.zero_stage < 3:
            buffers += working * (shard + count.largest_of_all)
        memory = replace(
            memory,
            gradients=memory.gradients if options.zero_stage == 1 else 0,
            masters=0,
            moments=0,
            buckets=memory.buckets + (working * count.largest_of_all if options.zero_stage < 3 else 0),
            step=0,
            host=memory.masters + memory.moments + buffers,
        )
    if options.offload_parameters:
        moved = working * (shard + frozen_shard)
        memory = replace(memory, parameters=memory.parameters - moved, host=memory.host + moved)
    return memory
