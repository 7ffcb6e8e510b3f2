"""``make critic-demo``: PPO with a critic against the baseline of a group, where one early word decides the reward.

A prompt names a key among filler words. The first word of the response decides the reward: 1 if it is an answer to the
key, otherwise 0. The rest of the response, up to 63 words, changes nothing. A baseline for the whole response cannot
tell which word earned the reward. A critic can: after the first word it knows the reward.

Each run is one process, without Ray, and finished runs are kept, so the command can be interrupted.

Shape legend: S rollouts.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from jobs.cli import run_job
from rlhf_critic.algorithms.advantages import RolloutBatch, compute_advantages, minibatch_rows
from rlhf_critic.algorithms.ppo import RunningMoments
from rlhf_critic.batching.prefix_tree import TokenIds
from rlhf_critic.config.model import BodyConfig, ModelConfig, OptimizerConfig
from rlhf_critic.config.ppo import AlgorithmConfig, RewardConfig
from rlhf_critic.config.train import TrainConfig
from rlhf_critic.data.encoding import Encoder, load_tokenizer
from rlhf_critic.evaluation.plots import save_comparison
from rlhf_critic.files import write_text_atomically
from rlhf_critic.model.generation import Response, TransformersGenerator
from rlhf_critic.training.critic_engine import CriticEngine
from rlhf_critic.training.policy_engine import PolicyEngine
from rlhf_critic.training.process_group import init_distributed, init_process_group, open_store

logger = logging.getLogger(__name__)

Baseline = Literal["critic", "rloo", "grpo"]

KEYS, SYNONYMS, FILLER = 2, 4, 16
ITERATIONS, PROMPTS, SAMPLES = 40, 16, 8
RESPONSE_TOKENS = 64
POLICY_RATE, CRITIC_RATE = 1e-3, 2e-3
CRITIC_EPOCHS, CRITIC_MINIBATCHES = 2, 4  # of an iteration; the policy takes one step
WARMUP_ITERATIONS = 2  # of the critic's run, counted among its iterations
WORDS = [*(f"key{number}" for number in range(KEYS)), *(f"answer{number}" for number in range(KEYS * SYNONYMS))]
VOCABULARY = ["[pad]", "[eos]", *WORDS, *(f"word{number}" for number in range(FILLER))]
TOKEN = {word: number for number, word in enumerate(VOCABULARY)}
OPTIMIZER = {"schedule": "constant", "warmup_fraction": 0.0, "token_budget": 16384, "weight_decay": 0.0}
DIRECTORY = Path("runs/critic-demo")
PLOT_NAME = "curves.png"
SEEDS = (0, 1, 2)
LABELS: dict[Baseline, str] = {"critic": "critic", "rloo": "RLOO (group of 8)"}
VARIED = (0.1, 0.9)  # mean rewards between which returns vary enough to be explained
Records = list[dict[str, Any]]


def main() -> None:
    """Makes all runs, draws their curves and prints the result."""
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    model = DIRECTORY / "model"
    if not model.exists():
        save_model(model)
    wanted = [(baseline, seed) for seed in SEEDS for baseline in LABELS]
    # Processes that are spawned, because each joins a process group of its own.
    context = multiprocessing.get_context("spawn")
    workers = max(1, min(len(wanted), os.cpu_count() or 1))
    with ProcessPoolExecutor(workers, context, initializer=_start) as pool:
        done = list(pool.map(_run, *zip(*wanted, strict=True)))
    runs: dict[Baseline, list[Records]] = {baseline: [] for baseline in LABELS}
    for (baseline, _), records in zip(wanted, done, strict=True):
        runs[baseline].append(records)
    save_comparison({LABELS[name]: records for name, records in runs.items()}, DIRECTORY / PLOT_NAME)
    show(Console(), runs)


def _start() -> None:
    torch.set_num_threads(1)
    join_alone()


def _run(baseline: Baseline, seed: int) -> Records:
    path = DIRECTORY / f"{baseline}-{seed}.json"
    if not path.exists():
        write_text_atomically(path, json.dumps(train(str(DIRECTORY / "model"), baseline, seed)))
        logger.info("finished run baseline=%s seed=%d", baseline, seed)
    records: Records = json.loads(path.read_text(encoding="utf-8"))
    return records


def explained(records: Records) -> float:
    """Returns the mean explained variance of a run over the iterations whose rewards vary; NaN if none does."""
    low, high = VARIED
    shares = [one["explained_variance"] for one in records if low <= one["reward"] <= high]
    return float(np.mean(shares)) if shares else float("nan")


def show(console: Console, runs: Mapping[Baseline, Sequence[Records]]) -> None:
    """Prints the rewards of all runs, and what the critic explains."""
    table = Table(title=f"Mean reward of three seeds, {PROMPTS * SAMPLES} rollouts an iteration", title_justify="left")
    for column in ("baseline", "all iterations", f"last 10 of {ITERATIONS}", "iterations to 0.8", "explained variance"):
        table.add_column(column, justify="left" if column == "baseline" else "right")
    for name, of_seeds in runs.items():
        rewards = np.array([[one["reward"] for one in records] for records in of_seeds])
        reached = [int(np.argmax(row >= 0.8)) + 1 if (row >= 0.8).any() else None for row in rewards]
        shares = f"{np.mean([explained(records) for records in of_seeds]):.2f}" if name == "critic" else "-"
        cells = [f"{part.mean():.3f} ± {part.mean(1).std(ddof=1):.3f}" for part in (rewards, rewards[:, -10:])]
        table.add_row(LABELS[name], *cells, ", ".join(map(str, reached)), shares)
    console.print(table)
    console.print(f"curves: {DIRECTORY / PLOT_NAME}", highlight=False, soft_wrap=True)


def save_model(directory: Path) -> None:
    """Saves a random GPT-2 of two layers, with a tokenizer of one token a word."""
    tokenizer = Tokenizer(models.WordLevel(TOKEN, unk_token="[pad]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[pad]", eos_token="[eos]").save_pretrained(directory)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(VOCABULARY),
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=128,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=0.08,
        pad_token_id=TOKEN["[pad]"],
        eos_token_id=TOKEN["[eos]"],
        bos_token_id=None,
    )
    GPT2LMHeadModel(config).save_pretrained(directory)


def join_alone() -> None:
    """Makes this process the only rank of a group, which the engines need."""
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", DS_ACCELERATOR="cpu")
    store, _ = open_store("127.0.0.1", on_one_node=True)
    init_process_group("gloo", store, 0, 1, timedelta(minutes=5), on_one_node=True)
    init_distributed("gloo")


def make_prompts(rng: np.random.Generator) -> list[list[int]]:
    """Makes the prompts of an iteration: a key among three filler words."""
    prompts = []
    for _ in range(PROMPTS):
        words = [TOKEN[f"word{number}"] for number in rng.integers(0, FILLER, 3)]
        words.insert(int(rng.integers(0, 4)), TOKEN[f"key{rng.integers(0, KEYS)}"])
        prompts.append(words)
    return prompts


def reward_of(prompt: Sequence[int], response: Response) -> float:
    """Returns 1 if the first word answers the key of the prompt, otherwise 0."""
    key = next(token for token in prompt if TOKEN["key0"] <= token < TOKEN["key0"] + KEYS)
    first = TOKEN["answer0"] + SYNONYMS * (key - TOKEN["key0"])
    return float(first <= response.ids[0] < first + SYNONYMS)


def train(model: str, baseline: Baseline, seed: int, iterations: int = ITERATIONS) -> list[dict[str, Any]]:
    """Trains a policy with PPO and returns the metrics of each iteration.

    Args:
        model: Directory of the model that policy and critic start from; see `save_model`.
        baseline: ``critic``, or a baseline of the group without a critic.
        seed: Random seed of prompts, samples and minibatches.
        iterations: Number of iterations.
    """
    algorithm = AlgorithmConfig(baseline=baseline, critic_lambda=1.0, gae_lambda=0.95, kl_coefficient=0.0)
    tokenizer = load_tokenizer(model, "plain")
    optimizer = OptimizerConfig(learning_rate=POLICY_RATE, **OPTIMIZER)
    policy = PolicyEngine(tokenizer, BodyConfig(path=model), optimizer, iterations, seed, 1.0)
    generator = TransformersGenerator(BodyConfig(path=model), tokenizer, 1.0, torch.device("cpu"))
    critic = None
    if baseline == "critic":
        options = TrainConfig(learning_rate=CRITIC_RATE, seed=seed, **OPTIMIZER)
        base = ModelConfig(path=model, head_init="zero")
        critic = CriticEngine.from_pretrained(
            Encoder(tokenizer, 128, "text"), base, options, CRITIC_EPOCHS * iterations
        )
    rng, records = np.random.default_rng(seed), []
    groups_S = np.repeat(np.arange(PROMPTS), SAMPLES)
    for iteration in range(iterations):
        prompts = [ids for ids in make_prompts(rng) for _ in range(SAMPLES)]
        generator.load(policy.weights())
        responses = generator.generate(prompts, RESPONSE_TOKENS, seed=1000 * seed + iteration)
        sequences: list[TokenIds] = [
            np.concatenate([ids, one.ids]) for ids, one in zip(prompts, responses, strict=True)
        ]
        lengths, log_probs = [len(ids) for ids in prompts], [one.log_probs for one in responses]
        values = [np.zeros(len(ids), np.float32) for ids in sequences] if critic is None else critic.values(sequences)
        batch = RolloutBatch(
            lengths,
            np.array([one.truncated for one in responses]),
            np.array([reward_of(*one) for one in zip(prompts, responses, strict=True)], dtype=np.float32),
            log_probs,
            log_probs,
            values,
            groups_S=groups_S,
        )
        targets = compute_advantages(batch, algorithm, RewardConfig(), RunningMoments())
        if critic is not None:
            for epoch in range(CRITIC_EPOCHS):
                for rows in minibatch_rows(groups_S.tolist(), CRITIC_MINIBATCHES, [seed, iteration, epoch]):
                    returns = [targets.returns[row] for row in rows]
                    old_values = [targets.old_values[row] for row in rows]
                    part = [sequences[row] for row in rows]
                    critic.update(part, [lengths[row] for row in rows], returns, old_values, clip=None)
        if critic is None or iteration >= WARMUP_ITERATIONS:
            policy.update(sequences, lengths, log_probs, targets.advantages, 0.2)
        records.append({"kind": "train", "step": iteration + 1, **targets.metrics})
    return records


if __name__ == "__main__":
    run_job(main)
