"""PPO of tiny random models in one process, for demos: the models, the loop, and processes that share the runs.

The loop is that of ``jobs.ppo`` with its engines and its mathematics, without Ray. Knows nothing about the tasks.

Shape legend: S rollouts.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from rlhf_critic.algorithms.advantages import RolloutBatch, compute_advantages, minibatch_rows
from rlhf_critic.algorithms.ppo import RunningMoments
from rlhf_critic.batching.prefix_tree import TokenIds
from rlhf_critic.config.model import BodyConfig, ModelConfig, OptimizerConfig
from rlhf_critic.config.ppo import AlgorithmConfig, RewardConfig
from rlhf_critic.config.train import TrainConfig
from rlhf_critic.data.encoding import Encoder, load_tokenizer
from rlhf_critic.files import write_text_atomically
from rlhf_critic.logs import configure_logging
from rlhf_critic.model.generation import Response, TransformersGenerator
from rlhf_critic.training.critic_engine import CriticEngine
from rlhf_critic.training.policy_engine import PolicyEngine
from rlhf_critic.training.process_group import init_distributed, init_process_group, open_store

SAMPLES = 8  # responses to a prompt
POLICY_RATE, CRITIC_RATE = 1e-3, 2e-3
CRITIC_MINIBATCHES = 4  # of an epoch of the critic; the policy takes one step an iteration
MAX_LENGTH = 128
SPECIAL_WORDS = ("[pad]", "[eos]")
OPTIMIZER = {"schedule": "constant", "warmup_fraction": 0.0, "token_budget": 16384, "weight_decay": 0.0}
Records = list[dict[str, Any]]  # of the iterations of a run
# Returns rewards fp32 [S] of responses to their prompts, and metrics of the iteration.
Rewards = Callable[[Sequence[Sequence[int]], Sequence[Response]], tuple[NDArray[np.float32], dict[str, float]]]


@dataclass(frozen=True)
class Task:
    """A task for a policy: prompts, and rewards of responses.

    Attributes:
        prompts: Makes the prompts of an iteration, as token ids.
        rewards: Rewards responses.
        response_tokens: Maximum number of tokens of a response.
    """

    prompts: Callable[[np.random.Generator], list[list[int]]]
    rewards: Rewards
    response_tokens: int


def start_process() -> None:
    """Makes this process the only rank of a group, which the engines need, with one thread."""
    configure_logging()
    logging.getLogger("transformers").setLevel(logging.ERROR)  # GPT-2 asks for a mask where a policy samples padding
    torch.set_num_threads(1)
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", DS_ACCELERATOR="cpu")
    store, _ = open_store("127.0.0.1", on_one_node=True)
    init_process_group("gloo", store, 0, 1, timedelta(minutes=5), on_one_node=True)
    init_distributed("gloo")


def run_all(
    run: Callable[[Path, str, int], Records], wanted: Sequence[tuple[str, int]], directory: Path
) -> list[Records]:
    """Makes all runs, one per core at a time, and keeps each in a file, so that an interrupted demo continues.

    Args:
        run: Makes a run from the directory, the name of its method, and its seed.
        wanted: Name of the method, and seed, of each run.
        directory: Where the runs are kept.
    """
    # Processes that are spawned, because each joins a process group of its own.
    context = multiprocessing.get_context("spawn")
    workers = max(1, min(len(wanted), os.cpu_count() or 1))
    with ProcessPoolExecutor(workers, context, initializer=start_process) as pool:
        done = [pool.submit(_kept, run, directory, method, seed) for method, seed in wanted]
        return [one.result() for one in tqdm(done, "runs", disable=None)]


def _kept(run: Callable[[Path, str, int], Records], directory: Path, method: str, seed: int) -> Records:
    path = directory / f"{method.replace(' ', '-')}-{seed}.json"
    if not path.exists():
        write_text_atomically(path, json.dumps(run(directory, method, seed)))
    records: Records = json.loads(path.read_text(encoding="utf-8"))
    return records


def save_model(directory: Path, words: Sequence[str]) -> None:
    """Saves a random GPT-2 of two layers, with a tokenizer of one token a word, if it is not there.

    Args:
        directory: Hugging Face directory.
        words: Words of the vocabulary. The ids of `SPECIAL_WORDS` come before theirs.
    """
    if directory.exists():
        return
    ids = {word: number for number, word in enumerate((*SPECIAL_WORDS, *words))}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="[pad]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[pad]", eos_token="[eos]").save_pretrained(directory)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(ids),
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=MAX_LENGTH,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=0.08,
        pad_token_id=ids["[pad]"],
        eos_token_id=ids["[eos]"],
        bos_token_id=None,
    )
    GPT2LMHeadModel(config).save_pretrained(directory)


def train(model: str, task: Task, algorithm: AlgorithmConfig) -> Records:
    """Trains a policy with PPO and returns the metrics of each iteration.

    Args:
        model: Directory of the model that policy and critic start from; see `save_model`.
        task: The prompts, and the rewards of responses.
        algorithm: Options of PPO. With a baseline of groups there is no critic. The policy takes one step an iteration.
    """
    seed, iterations = algorithm.seed, algorithm.iterations
    tokenizer = load_tokenizer(model, "plain")
    optimizer = OptimizerConfig(learning_rate=POLICY_RATE, **OPTIMIZER)
    policy = PolicyEngine(tokenizer, BodyConfig(path=model), optimizer, iterations, seed, 1.0)
    generator = TransformersGenerator(BodyConfig(path=model), tokenizer, 1.0, torch.device("cpu"))
    critic = None
    if algorithm.baseline == "critic":
        options = TrainConfig(learning_rate=CRITIC_RATE, seed=seed, **OPTIMIZER)
        base, steps = ModelConfig(path=model, head_init="zero"), algorithm.critic_epochs * iterations
        critic = CriticEngine.from_pretrained(Encoder(tokenizer, MAX_LENGTH, "text"), base, options, steps)
    rng, records = np.random.default_rng(seed), []
    for iteration in range(iterations):
        asked = task.prompts(rng)
        groups_S = np.repeat(np.arange(len(asked)), SAMPLES)
        prompts = [asked[group] for group in groups_S]
        generator.load(policy.weights())
        responses = generator.generate(prompts, task.response_tokens, seed=1000 * seed + iteration)
        sequences: list[TokenIds] = [
            np.concatenate([ids, one.ids]) for ids, one in zip(prompts, responses, strict=True)
        ]
        lengths, log_probs = [len(ids) for ids in prompts], [one.log_probs for one in responses]
        rewards_S, measured = task.rewards(prompts, responses)
        batch = RolloutBatch(
            lengths,
            np.array([one.truncated for one in responses]),
            rewards_S,
            log_probs,
            policy.reference_log_probs(sequences, lengths),
            [np.zeros(len(ids), np.float32) for ids in sequences] if critic is None else critic.values(sequences),
            groups_S=groups_S,
        )
        targets = compute_advantages(batch, algorithm, RewardConfig(), RunningMoments())
        if critic is not None:
            for epoch in range(algorithm.critic_epochs):
                for rows in minibatch_rows(groups_S.tolist(), CRITIC_MINIBATCHES, [seed, iteration, epoch]):
                    part = [sequences[row] for row in rows]
                    returns = [targets.returns[row] for row in rows]
                    old_values = [targets.old_values[row] for row in rows]
                    critic.update(part, [lengths[row] for row in rows], returns, old_values, clip=None)
        if iteration >= algorithm.value_warmup_iterations:
            policy.update(sequences, lengths, log_probs, targets.advantages, algorithm.clip)
        records.append({"kind": "train", "step": iteration + 1, **targets.metrics, **measured})
    return records
