"""The plan of a training job: steps, tokens and memory, calculated without starting a worker."""

from __future__ import annotations

import numpy as np
from rich.table import Column, Table
from tqdm import tqdm

from rlhf_critic.algorithms.preference_objective import needs_values
from rlhf_critic.batching.planner import plan_micro_batches
from rlhf_critic.batching.prefix_tree import PrefixTree
from rlhf_critic.batching.sampler import DataOrder
from rlhf_critic.checkpoint.reward_model import ignored_end_at_start
from rlhf_critic.config.deepspeed import Hardware
from rlhf_critic.config.train import TrainJobConfig
from rlhf_critic.data.training_data import load_data, total_steps
from rlhf_critic.model.critic import Critic
from rlhf_critic.model.factory import DTYPE_OF, check_critic_model, limit_training, validate_positions
from rlhf_critic.training.memory_estimate import activation_bytes, count_model, shard_memory

SAMPLED_STEPS = 8


def plan_table(config: TrainJobConfig) -> Table:
    """Calculates the plan of a run with these options.

    Raises:
        CriticError: The model or the data cannot be read.
    """
    config = config.resolved()
    data = load_data(config, ignored_end_at_start(config.model.path))
    model = check_critic_model(config.model.path, data.encoder.tokenizer, config.model.num_layers)
    validate_positions(model, data.encoder.max_length)
    embedding = sum(parameter.numel() for parameter in model.get_input_embeddings().parameters())
    options = config.train
    hardware = Hardware(on_gpu=config.run.use_gpu, ranks=config.run.num_workers)
    critic = Critic(model, prefix_tree=config.model.prefix_tree)
    limit_training(critic, config.model, options.seed)
    critic.to(DTYPE_OF[config.model.dtype])
    count = count_model(critic)
    steps = total_steps(len(data.train), options)
    tokens, computed, micro_batches = [], [], []
    order = DataOrder(data.train.prompts_N, options.seed)
    for step in tqdm(np.unique(np.linspace(0, steps - 1, SAMPLED_STEPS).astype(int)), desc="planning", disable=None):
        rows = order.rows_of_step(options.global_batch_size, int(step), options.epochs)
        units = [preference.responses for preference in data.train.take(rows)]
        tokens.append(int(data.train.tokens_N[rows].sum()))
        computed.append(len(PrefixTree.build([ids for unit in units for ids in unit])))
        if options.token_budget != "auto":
            plan = plan_micro_batches(units, config.run.num_workers, options.token_budget, config.model.prefix_tree)
            micro_batches.append(len(plan[0]))
    length = data.encoder.max_length
    budget = length if options.token_budget == "auto" else options.token_budget  # auto is assumed to be one sequence
    recompute, rewards_only = options.gradient_checkpointing, not needs_values(options)
    kept = activation_bytes(critic, budget, length, gradient_checkpointing=recompute, rewards_only=rewards_only)
    planned = f"{np.mean(micro_batches):.1f} per rank" if micro_batches else "measured at the start"
    memory = shard_memory(count, config.model, options, hardware, kept)
    title = f"plan of {config.run.name}, calculated without starting anything"
    table = Table("quantity", Column("value", overflow="fold"), title=title, title_justify="left")
    for row in (
        ("data", str(data)),
        ("optimizer steps", f"{steps:,} of {options.global_batch_size} preferences"),
        ("tokens per step", f"{np.mean(tokens):,.0f}"),
        ("  computed tokens, with shared prefixes once", f"{np.mean(computed):,.0f}"),
        ("micro-batches per step", planned),
        ("parameters", f"{count.parameters:,}, of which embedding {embedding:,}, trained {sum(count.trained):,}"),
        ("shards", f"{config.run.num_workers}, ZeRO-{options.zero_stage}, {config.model.dtype}"),
        (
            "memory of a shard (calculated)",
            f"{memory.peak / 1e9:.2f} GB at peak: {memory.states / 1e9:.2f} of parameters, gradients and optimizer, "
            f"{kept / 1e9:.2f} of activations of {budget:,} tokens, the rest buffers",
        ),
    ):
        table.add_row(*row)
    if memory.host:
        table.add_row("  CPU memory of a shard", f"{memory.host / 1e9:.2f} GB")
    return table
