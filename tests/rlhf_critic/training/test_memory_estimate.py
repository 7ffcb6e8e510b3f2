"""The calculated memory equals what real ranks hold, and what a real forward and backward pass keep.

The functions are sent to real ranks (Ray actors) and run there.
"""

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForSequenceClassification

from rlhf_critic.batching.sampler import DataOrder
from rlhf_critic.config.deepspeed import Hardware
from rlhf_critic.config.model import ModelConfig
from rlhf_critic.config.train import TrainConfig
from rlhf_critic.data.encoding import Encoder, load_tokenizer
from rlhf_critic.data.preferences import load_preferences
from rlhf_critic.model.critic import Critic
from rlhf_critic.model.factory import DTYPE_OF, critic_without_weights, limit_training
from rlhf_critic.model.hf_config import silence_dropout
from rlhf_critic.training.critic_engine import CriticEngine
from rlhf_critic.training.memory_estimate import PERSISTENT, ModelCount, activation_bytes, count_model, shard_memory
from rlhf_critic.training.offload import _storages
from rlhf_critic.training.token_budget import ActivationMeter
from tests.helpers import save_tiny_model, slow_except
from tests.rlhf_critic.families import family_configs

SHAPE = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 3}


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def small_model(tmp_path_factory) -> str:
    """A model of about 3 million parameters, most in matrices above ZeRO-3's threshold, some below it."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "small", tie_word_embeddings=False, **SHAPE)


# --- memory of DeepSpeed ---


def held_bytes(deepspeed_engine: Any) -> int:
    """Returns the bytes of distinct storages of parameters, gradients and optimizer state, without buckets."""
    buckets = getattr(deepspeed_engine.optimizer, "ipg_buckets", {}).values()
    buffers = {t.untyped_storage().data_ptr() for bucket in buckets for t in tree_leaves(bucket.buffer)}
    found = _storages(deepspeed_engine, [])
    return sum(storage.nbytes() for storage in found if storage.data_ptr() not in buffers)


def measure(source: str, data: str, cache: str, model: ModelConfig, train: TrainConfig) -> dict[str, Any]:
    """Returns this rank's bytes between two micro-batches and after a step, neither of them the first."""
    encoder = Encoder(load_tokenizer(source), max_length=64)
    engine = CriticEngine.from_pretrained(encoder, model.model_copy(update={"path": source}), train, 10)
    preferences = load_preferences(data, encoder, cache)
    held, deepspeed_engine = {}, engine.training.engine
    gathered = [0]
    take_step = deepspeed_engine.step

    def look_and_step() -> None:
        take_step()
        held.setdefault("between micro-batches", held_bytes(deepspeed_engine))

    def look_at_gathered(*_: Any) -> None:
        gathered.append(sum(p.data.numel() for p in engine.critic.parameters() if hasattr(p, "ds_id")))

    for index in range(3):
        if index == 2:
            deepspeed_engine.step = look_and_step
            engine.critic.model.score.register_forward_hook(look_at_gathered)
        rows = DataOrder(preferences.prompts_N, 0).rows_of_step(train.global_batch_size, engine.step, 10.0)
        micro_batches = engine.train_step(preferences, rows).micro_batches
    held["after a step"] = held_bytes(deepspeed_engine)
    return {**held, "gathered": max(gathered), "micro_batches": micro_batches}


def allocated(run: Callable[[], Any], trace: Path) -> int:
    """Returns the peak of the CPU allocator's memory during ``run``, above its level before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    profiled.export_chrome_trace(str(trace))
    found = [event for event in json.loads(trace.read_text())["traceEvents"] if event["name"] == "[memory]"]
    events = [event["args"] for event in sorted(found, key=lambda event: event["ts"])]  # of all threads
    return max(event["Total Allocated"] for event in events) - (events[0]["Total Allocated"] - events[0]["Bytes"])


def options(stage: int, dtype: str = "float32", **changes: Any) -> tuple[ModelConfig, TrainConfig]:
    in_model = {name: value for name, value in changes.items() if name in ModelConfig.model_fields}
    in_train = {name: value for name, value in changes.items() if name in TrainConfig.model_fields}
    train = {"global_batch_size": 12, "token_budget": 400, "zero_stage": stage, **in_train}
    return ModelConfig(dtype=dtype, **in_model), TrainConfig(**train)


def calculated(source: str, model: ModelConfig, train: TrainConfig, world_size: int) -> Any:
    critic = critic_without_weights(AutoConfig.from_pretrained(source), model)
    return shard_memory(count_model(critic), model, train, Hardware(ranks=world_size))


@pytest.mark.parametrize(
    ("stage", "world_size", "dtype"),
    slow_except(
        [(0, 1, "float32"), (2, 2, "float32"), (3, 2, "float32")],
        [(stage, *one) for stage in range(4) for one in ((1, "float32"), (2, "float32"), (2, "bfloat16"))],
    ),
)
def test_parameters_gradients_and_optimizer_are_what_a_rank_holds(
    ranks, small_model, preference_file, cache, stage, dtype, world_size
):
    model, train = options(stage, dtype)
    memory = calculated(small_model, model, train, world_size)
    for found in ranks(world_size).run(measure, small_model, preference_file, cache, model, train):
        assert found["micro_batches"] > 1
        assert found["between micro-batches"] == pytest.approx(memory.states, rel=0.05)
        # Stage 3 keeps the memory of gradients between steps; other stages free it.
        after = memory.states - (memory.gradients if stage < 3 else 0)
        assert found["after a step"] == pytest.approx(after, rel=0.05)


@pytest.mark.parametrize(
    ("stage", "dtype", "changes"),
    slow_except(
        [
            (1, "float32", {"offload_optimizer": True}),
            (2, "float32", {"lora_rank": 8}),
            (2, "float32", {"freeze_layers": 1}),
        ],
        [
            (1, "float32", {"offload_optimizer": True}),
            (2, "bfloat16", {"offload_optimizer": True}),
            (3, "float32", {"offload_optimizer": True}),
            (3, "bfloat16", {"offload_optimizer": True, "offload_parameters": True}),
            (0, "bfloat16", {"lora_rank": 8}),
            (2, "float32", {"lora_rank": 8}),
            (3, "float32", {"lora_rank": 8}),
            (0, "float32", {"freeze_layers": 1}),
            (2, "float32", {"freeze_layers": 1}),
            (3, "bfloat16", {"freeze_layers": 1}),
        ],
    ),
)
def test_what_is_offloaded_frozen_or_adapted_is_counted_as_such(
    ranks, small_model, preference_file, cache, stage, dtype, changes
):
    model, train = options(stage, dtype, **changes)
    memory = calculated(small_model, model, train, 2)
    # On the CPU, offloaded memory is counted with the rest, and so is the buffer for one gradient.
    in_place = {name: value for name, value in changes.items() if "offload" not in name}
    buffer = memory.buckets - calculated(small_model, *options(stage, dtype, **in_place), 2).buckets
    for found in ranks(2).run(measure, small_model, preference_file, cache, model, train):
        assert found["between micro-batches"] == pytest.approx(memory.states + memory.host + buffer, rel=0.05)


def peak_of_a_step(
    source: str, data: str, cache: str, model: ModelConfig, train: TrainConfig, trace: str
) -> tuple[int, int]:
    """Returns this rank's bytes between two steps without buckets, and its allocator's additional peak in a step."""
    encoder = Encoder(load_tokenizer(source), max_length=64)
    engine = CriticEngine.from_pretrained(encoder, model.model_copy(update={"path": source}), train, 10)
    preferences = load_preferences(data, encoder, cache)

    def step() -> None:
        engine.train_step(preferences, DataOrder(preferences.prompts_N, 0).rows_of_step(12, engine.step, 10.0))

    step()
    step()
    gc.collect()  # garbage would be counted at the start of the step and freed during it
    held = held_bytes(engine.training.engine)
    return held, allocated(step, Path(f"{trace}-{engine.rank}.json"))


@pytest.mark.parametrize(
    ("stage", "dtype"),
    slow_except(
        [(2, "float32")],
        [*((stage, "float32") for stage in range(4)), (2, "bfloat16"), (3, "bfloat16")],
    ),
)
def test_the_peak_is_what_the_allocator_gives_out_in_a_step(
    ranks, small_model, preference_file, cache, tmp_path, stage, dtype
):
    model, train = options(stage, dtype)
    critic = critic_without_weights(AutoConfig.from_pretrained(small_model), model)
    activations = activation_bytes(critic, 400, 64, gradient_checkpointing=False)
    memory = shard_memory(count_model(critic), model, train, Hardware(ranks=2), activations)
    # Stage 3 allocated its bucket before the step.
    bucket = (4 if dtype == "float32" else 2) * 20_000_000 if stage == 3 else 0
    arguments = (small_model, preference_file, cache, model, train, str(tmp_path / "trace"))
    for held, on_top in ranks(2).run(peak_of_a_step, *arguments):
        # The time at which stage 3 prefetches parameters varies between runs.
        assert memory.peak == pytest.approx(held + bucket + on_top, rel=0.2 if stage == 3 else 0.12)


def test_stage_3_keeps_the_whole_of_a_small_model_gathered(ranks, small_model, preference_file, cache):
    model, train = options(3)
    memory = calculated(small_model, model, train, 2)
    count = count_model(critic_without_weights(AutoConfig.from_pretrained(small_model), model))
    small = sum(size for size in count.trained if size <= PERSISTENT)
    for found in ranks(2).run(measure, small_model, preference_file, cache, model, train):
        assert 4 * (found["gathered"] - small) == pytest.approx(memory.gathered, rel=0.1)


def test_a_shard_by_hand():
    """One billion parameters in four matrices and a frozen tenth of that, bf16 on 4 ranks, in millions of bytes."""
    count = ModelCount(
        trained=(250_000_000,) * 4, frozen=(100_000_000,), largest=250_000_000, largest_of_all=250_000_000
    )
    for stage, parts in {
        0: (2200, 2000, 4000, 8000, 0, 0),
        1: (2200, 2000, 1000, 2000, 40, 0),
        2: (2200, 500, 1000, 2000, 540, 0),
        3: (550, 500, 1000, 2000, 540, 2000),
    }.items():
        memory = shard_memory(count, *options(stage, "bfloat16"), Hardware(ranks=4), activations=6_000_000_000)
        found = (memory.parameters, memory.gradients, memory.masters, memory.moments, memory.buckets, memory.gathered)
        assert tuple(part // 10**6 for part in found) == parts
        assert memory.peak == sum(found) + 6_000_000_000
    whole = shard_memory(count, *options(0), Hardware())
    assert whole.peak == whole.states == 4 * 1_100_000_000 + 12 * 1_000_000_000


# --- memory of the forward pass ---


TOKENS, LENGTH = 1000, 48
LARGER = {
    "llama": {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 4},
    "gpt2": {"n_embd": 64, "n_layer": 4},
}


def larger(family: str) -> Any:
    config = family_configs()[family]
    for name, value in LARGER.get(family, {}).items():
        setattr(config, name, value)
    return config


def passes(config: Any, model: ModelConfig, checkpointing: bool, trace: Path) -> dict[str, int]:
    """Returns what a real forward pass saves, and the CPU allocator's peak during it and the backward pass.

    Gradients of parameters are freed as they are computed.
    """
    silence_dropout(config)
    critic = Critic(AutoModelForSequenceClassification.from_config(config).to(DTYPE_OF[model.dtype]))
    limit_training(critic, model, 0)
    if checkpointing:
        critic.gradient_checkpointing_enable()
    critic.train()
    for parameter in critic.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    ids = torch.randint(3, config.vocab_size, (TOKENS,)).split(LENGTH)
    batch = critic.batch_of([row.tolist() for row in ids])
    meter = ActivationMeter()
    with meter.running(critic.parameters(), lambda: None):
        critic(batch, rewards_only=True).sum()
    peak = allocated(lambda: critic(batch, rewards_only=True).sum().backward(), trace)
    return {"saved": meter.bytes, "peak": peak, "tokens": batch.computed_tokens}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("family", "dtype", "changes"),
    [
        ("llama", "float32", {}),
        ("llama", "bfloat16", {}),
        ("llama", "bfloat16", {"lora_rank": 4}),
        ("llama", "float32", {"freeze_layers": 2}),
        ("gpt2", "float32", {}),
        ("gpt2", "bfloat16", {}),
        ("qwen2", "bfloat16", {}),
        ("gpt_neox", "float32", {}),
    ],
)
def test_activations_are_what_two_passes_take(family, dtype, changes, checkpointing, tmp_path):
    model = ModelConfig(dtype=dtype, **changes)
    found = passes(larger(family), model, checkpointing, tmp_path / "trace.json")
    critic = critic_without_weights(larger(family), model)
    estimate = activation_bytes(critic, found["tokens"], LENGTH, gradient_checkpointing=checkpointing)
    assert estimate == pytest.approx(found["peak"], rel=0.05)
    if not checkpointing:  # saved tensors are nearly all of the memory
        assert found["saved"] < estimate < 1.25 * found["saved"]


SMALL = {"vocab_size": 104, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
PADDED = {
    "gemma3_text": {**SMALL, "intermediate_size": 64, "head_dim": 8, "num_key_value_heads": 2, "sliding_window": 8},
    "phi": {**SMALL, "intermediate_size": 64},
    "gptj": {"vocab_size": 104, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
    "starcoder2": {**SMALL, "intermediate_size": 64, "num_key_value_heads": 2},
    "mpt": {"vocab_size": 104, "d_model": 32, "n_heads": 4, "n_layers": 2},
    "mixtral": {**SMALL, "intermediate_size": 64, "num_key_value_heads": 2, "num_local_experts": 4},
    "llama": {**SMALL, "intermediate_size": 64, "num_key_value_heads": 2},
    "gpt2": {"vocab_size": 104, "n_embd": 32, "n_layer": 2, "n_head": 4},
}


@pytest.mark.parametrize("family", PADDED)
def test_padded_batches_can_be_counted_too(family):
    """Masks of padded batches ask for values, which tensors without memory do not have."""
    critic = critic_without_weights(AutoConfig.for_model(family, **PADDED[family]), ModelConfig(prefix_tree=False))
    half, whole, checkpointed = (
        activation_bytes(critic, tokens, 64, gradient_checkpointing=checkpointing)
        for tokens, checkpointing in ((512, False), (1024, False), (1024, True))
    )
    assert whole == pytest.approx(2 * half, rel=0.05)
    assert 0 < checkpointed < whole


@pytest.mark.parametrize("family", family_configs())
def test_every_family_can_be_counted_without_weights(family):
    """Twice the tokens need twice the memory, and checkpointing needs less, also for padded families."""
    critic = critic_without_weights(family_configs()[family], ModelConfig())
    half, whole, checkpointed = (
        activation_bytes(critic, tokens, 64, gradient_checkpointing=checkpointing)
        for tokens, checkpointing in ((512, False), (1024, False), (1024, True))
    )
    assert whole == pytest.approx(2 * half, rel=0.05)
    assert 0 < checkpointed < whole
    assert all(parameter.grad is None for parameter in critic.parameters())
