"""Memory estimate: the memory of one rank that trains a critic, part by part, calculated without weights or device.

The code that trains also counts activations, for every family: it runs on tensors that have shapes and no memory. The
rest follows DeepSpeed 0.19's source. Tests compare both with measured bytes.

DeepSpeed's own ``estimate_zero2_model_states_mem_needs`` and ``estimate_zero3_model_states_mem_needs`` ignore stages 0
and 1, frozen weights, buckets and activations, assume 16-bit weights, and multiply uncertain parts by 1.5.

Knows nothing about GPUs, clusters or allocators: the memory of a CUDA context and fragmentation comes on top.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlhf_critic.config.deepspeed import Hardware, bucket_elements
from rlhf_critic.config.model import BodyConfig, OptimizerConfig
from rlhf_critic.model.critic import Critic

FP32_BYTES = 4
ADAM_BYTES = 8  # two moments in fp32
WORKING_BYTES = {"float32": 4, "bfloat16": 2}
# Defaults of DeepSpeed 0.19 that `deepspeed_config` does not change, in elements.
PERSISTENT = 100_000  # stage3_param_persistence_threshold: smaller parameters stay gathered
MAX_GATHERED = 1_000_000_000  # stage3_max_live_parameters: maximum of other parameters that stay gathered
ALL_REDUCE = 500_000_000  # MEMORY_OPT_ALLREDUCE_SIZE: number of gradients that stage 0 flattens at once


@dataclass(frozen=True)
class ModelCount:
    """Sizes of a model's parameters, in elements; shared parameters count once.

    Attributes:
        trained: Sizes of the trained parameters.
        frozen: Sizes of the frozen parameters.
        largest: Size of the largest trained parameter but the input embedding, whose gradient is computed last, when
            all activations are freed.
        largest_of_all: Size of the largest trained parameter.
    """

    trained: tuple[int, ...]
    frozen: tuple[int, ...]
    largest: int
    largest_of_all: int

    @property
    def parameters(self) -> int:
        """Number of all parameters, in elements."""
        return sum(self.trained) + sum(self.frozen)


@dataclass
class ShardMemory:
    """Memory of each rank, in bytes.

    Attributes:
        parameters: Weights in the dtype of training; at stage 3 this rank's part and the small ones, always gathered.
        gradients: Gradients held between micro-batches.
        masters: The optimizer's fp32 copy of the parameters it updates.
        moments: AdamW's moments.
        buckets: Buffers for reducing gradients during the backward pass.
        gathered: Full parameters that stage 3 keeps gathered while it computes.
        activations: Activations; see `activation_bytes`.
        reduction: Buffers at the end of the backward pass, when all activations are freed.
        step: All gradients during the optimizer's step, including its fp32 copy.
        host: CPU memory used by offloading.
    """

    parameters: int
    gradients: int
    masters: int
    moments: int
    buckets: int = 0
    gathered: int = 0
    activations: int = 0
    reduction: int = 0
    step: int = 0
    host: int = 0

    @property
    def states(self) -> int:
        """Parameters, gradients and optimizer state, which do not depend on the batch."""
        return self.parameters + self.gradients + self.masters + self.moments

    @property
    def peak(self) -> int:
        """Maximum at any time: in the backward pass, at its end, or in the optimizer's step.

        Counts all activations and all gradients of a micro-batch together, although activations are freed as gradients
        are computed.
        """
        backward = self.gradients + self.buckets + self.gathered + self.activations
        return self.parameters + self.masters + self.moments + max(backward, self.gradients + self.reduction, self.step)


def count_model(critic: Critic) -> ModelCount:
    """Counts the parameters of a critic that is not partitioned, on any device."""
    trained = tuple(parameter.numel() for parameter in critic.parameters() if parameter.requires_grad)
    frozen = tuple(parameter.numel() for parameter in critic.parameters() if not parameter.requires_grad)
    embedding = {id(parameter) for parameter in critic.model.get_input_embeddings().parameters()}
    others = [p.numel() for p in critic.parameters() if p.requires_grad and id(p) not in embedding]
    return ModelCount(trained, frozen, max(others, default=0), max(trained, default=0))


class _LiveBytes(TorchDispatchMode):
    """Dispatch mode that tracks every storage created within it until the storage is freed.

    Args:
        known: Tensors whose storages existed before.

    Attributes:
        peak: Maximum number of bytes of tracked storages at any time.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.peak = self._live = 0
        # Storages have no usable address: on the meta device all are at address 0.
        self._seen = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            # A model asks whether its mask has no padding, which tensors without values cannot answer. False is the
            # answer that takes more memory: the mask is kept.
            return False if args[0].dtype == torch.bool else 0
        if func is torch.ops.aten._grouped_mm.default and args[0].is_meta:
            result = _grouped_product(*args, **(kwargs or {}))
        else:
            result = func(*args, **(kwargs or {}))
        for storage in (leaf.untyped_storage() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)):
            key, size = storage._cdata, storage.nbytes()
            if key not in self._seen:
                self._seen.add(key)
                self._live += size
                self.peak = max(self.peak, self._live)
                weakref.finalize(storage, self._forget, key, size)
        return result

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self._live -= size


def _grouped_product(left: Tensor, right: Tensor, offsets: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    """Returns the empty product of experts, whose meta kernel in torch takes bfloat16 only.

    Without an expert dimension in a factor, ``offsets`` has the end of each expert's rows or columns.
    """
    shape = [left.shape[-2], right.shape[-1]]
    if left.dim() == right.dim():  # 3: a product for each expert; 2: the gradient of the experts' weights
        experts = left.shape[0] if left.dim() == 3 or offsets is None else len(offsets)
        shape = [experts, *shape]
    return left.new_empty(shape)


def activation_bytes(
    critic: Critic, tokens: int, length: int, *, gradient_checkpointing: bool, rewards_only: bool = True
) -> int:
    """Computes the peak memory of a forward and a backward pass beside parameters and gradients, in bytes.

    Counts what the forward pass keeps (with gradient checkpointing the input of every layer: Chen et al., "Training
    deep nets with sublinear memory cost" (2016)), what the backward pass recomputes, and the tensors between operators,
    such as a weight's gradient before it is accumulated, but no memory inside kernels. Attention is that of CPUs; the
    kernels of GPUs keep the same tensors.

    Args:
        critic: The critic on the meta device, as it is trained: in its dtype, with its adapters and frozen weights.
        tokens: Tokens that are computed, the token budget of a micro-batch.
        length: Maximum length of a sequence in tokens. Sequences share no prefix here.
        gradient_checkpointing: Whether activations are recomputed in the backward pass.
        rewards_only: Whether the loss reads rewards only, which skips most of the last layer.
    """
    sequences = [np.full(min(length, tokens - start), row) for row, start in enumerate(range(0, tokens, length))]
    batch = critic.batch_of(sequences, "meta")
    critic.train()
    if gradient_checkpointing:
        critic.gradient_checkpointing_enable()
    else:
        critic.gradient_checkpointing_disable()

    def drop_gradient(parameter: Tensor) -> None:
        parameter.grad = None

    trained = (parameter for parameter in critic.parameters() if parameter.requires_grad)
    hooks = [parameter.register_post_accumulate_grad_hook(drop_gradient) for parameter in trained]
    with torch.enable_grad(), _LiveBytes([*critic.parameters(), *critic.buffers()]) as live:
        critic(batch, rewards_only=rewards_only).sum().backward()
    for hook in hooks:
        hook.remove()
    return live.peak


def shard_memory(
    count: ModelCount, model: BodyConfig, options: OptimizerConfig, hardware: Hardware, activations: int = 0
) -> ShardMemory:
    """Computes the memory of each rank.

    Shards: Rajbhandari et al., "ZeRO: memory optimizations toward training trillion parameter models" (2020). The rest
    follows DeepSpeed 0.19's ``zero/stage_1_and_2.py``, ``zero/stage3.py``, ``fp16/unfused_optimizer.py`` (stage 0 in
    bf16) and ``engine.py``.

    Args:
        count: Parameter counts of the full model.
        model: Options of the model, for its dtype.
        options: Options of the optimizer, for the ZeRO stage and offloading.
        hardware: The devices of the ranks.
        activations: Bytes of activations; see `activation_bytes`.
    """
    working = WORKING_BYTES[model.resolved(hardware.on_gpu).dtype]
    stage, trained, world_size = options.zero_stage, sum(count.trained), hardware.ranks
    fp32_copy = FP32_BYTES if working < FP32_BYTES else 0  # of a gradient in bf16, during the optimizer's step
    if stage == 0:
        return ShardMemory(
            parameters=working * count.parameters,
            gradients=working * trained,
            masters=fp32_copy * trained,
            moments=ADAM_BYTES * trained,
            activations=activations,
            reduction=working * min(trained, ALL_REDUCE) if world_size > 1 else 0,
            step=(working + fp32_copy) * trained,
        )

    def part(sizes: tuple[int, ...]) -> int:
        """Returns the elements of a rank. Stage 3 divides every parameter, other stages all of them together."""
        return sum(-(-size // world_size) for size in sizes) if stage == 3 else -(-sum(sizes) // world_size)

    shard, largest = part(count.trained), count.largest_of_all
    bucket = bucket_elements(trained, hardware)
    filled = min(bucket, trained)
    in_flight = 2 if hardware.on_gpu and world_size > 1 and stage < 3 else 1  # one is filled while one is reduced
    memory = ShardMemory(
        parameters=working * count.parameters,
        # Stage 1 reduces them after the last micro-batch. Stage 2 adds each micro-batch's part to its shard.
        gradients=working * (trained if stage == 1 else shard),
        masters=FP32_BYTES * shard,
        moments=ADAM_BYTES * shard,
        # The bucket's contents are copied into a flat buffer for reduction; so is a gradient larger than a bucket.
        buckets=working * (in_flight * bucket if stage == 1 else in_flight * bucket + max(filled, count.largest)),
        activations=activations,
        reduction=working * (in_flight * bucket + max(filled, largest) + (largest if largest > bucket else 0)),
        step=shard * (2 * working + fp32_copy),  # accumulated gradients, their flat copy and its fp32 copy
    )
    if stage == 3:
        sizes = (*count.trained, *count.frozen)
        # With one rank the part is the full model, so nothing is gathered, except from CPU memory.
        gathered = sizes if world_size > 1 or options.offload_parameters else ()
        small = sum(size for size in gathered if size <= PERSISTENT)
        memory.parameters = working * (part(sizes) + small)
        memory.gathered = working * min(sum(gathered) - small, MAX_GATHERED)
        memory.step += working * bucket  # this bucket is never freed
    if options.offload_optimizer:
        memory.host = memory.masters + memory.moments + FP32_BYTES * shard  # and fp32 gradients for AdamW
        memory.masters = memory.moments = memory.step = 0
        if stage > 1:
            memory.host += working * shard  # gradients of micro-batches before the last
            memory.gradients = 0
        if stage < 3:
            # The updated parameters return to the GPU. CPU and GPU have a buffer for one gradient each.
            memory.host += working * (shard + largest)
            memory.buckets += working * largest
    if options.offload_parameters:
        moved = working * (shard + part(count.frozen))
        memory.parameters -= moved
        memory.host += moved
    return memory
