"""The example for other PPO trainers runs unchanged on real scorers and shards, and does what its docstring states."""

import types

import numpy as np
import pytest
import torch

from jobs.examples import your_ppo_loop
from rlhf_critic.algorithms import ppo
from rlhf_critic.checkpoint.critic_directory import load_critic
from tests.actors.scorers import rewards_by_engine
from tests.helpers import WORDS

pytestmark = [pytest.mark.timeout(400), pytest.mark.slow]


def make_batch(encoder, seed: int) -> types.SimpleNamespace:
    """Returns rollouts of a trainer: four responses to each of three prompts, one of them empty."""
    rng = np.random.default_rng(seed)
    prompts, responses, sequences, prompt_lengths = [], [], [], []
    for _ in range(3):
        prompt = " ".join(rng.choice(WORDS, 5))
        opened = encoder.tokenizer(encoder.open(prompt), add_special_tokens=False)["input_ids"]
        for number in range(4):
            response = " ".join(rng.choice(WORDS, 3 * number))
            ids = encoder.tokenizer(response, add_special_tokens=False)["input_ids"]
            prompts.append(prompt)
            responses.append(response)
            sequences.append([*opened, *ids])
            prompt_lengths.append(len(opened))
    lengths = [len(ids) - length for ids, length in zip(sequences, prompt_lengths, strict=True)]
    log_probs = [rng.normal(-2, 0.3, length).astype(np.float32) for length in lengths]
    return types.SimpleNamespace(
        prompts=prompts,
        responses=responses,
        sequences=sequences,
        prompt_lengths=prompt_lengths,
        log_probs=log_probs,
        ref_log_probs=[numbers + 0.1 for numbers in log_probs],
    )


def test_the_example_for_other_trainers_runs_as_it_is(serving, critics, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    serving(critics["first"])
    loaded = load_critic(critics["first"])
    batches = [make_batch(loaded.encoder, seed) for seed in range(3)]
    seen = []
    your_ppo_loop.run(critics["first"], batches, lambda batch, advantages: seen.append((batch, advantages)), steps=3)

    first, advantages_SL = seen[0]
    rewards_S = rewards_by_engine(critics["first"], list(zip(first.prompts, first.responses, strict=True)))
    with torch.no_grad():
        of_tokens = [loaded.critic.values(loaded.critic.batch_of([ids]))[0].numpy() for ids in first.sequences]
    values, _ = ppo.action_values(of_tokens, first.prompt_lengths)
    expected = []
    for row, value in enumerate(values):
        following, following_value, backwards = 0.0, 0.0, []
        for action in reversed(range(len(value))):
            kl = first.log_probs[row][action] - first.ref_log_probs[row][action]
            reward = -0.05 * kl + (rewards_S[row] if action == len(value) - 1 else 0.0)
            following = reward + following_value - value[action] + 0.95 * following
            following_value = value[action]
            backwards.append(following)
        expected.append(backwards[::-1])
    flat = np.concatenate(expected)
    whitened = [(np.array(row) - flat.mean()) / flat.std() for row in expected]
    for row, numbers in enumerate(whitened):
        np.testing.assert_allclose(advantages_SL[row, : len(numbers)].numpy(), numbers, atol=2e-4)
    assert len(seen) == 3
    saved = load_critic(tmp_path / "my-value-critic")
    assert saved.card.version == "critic@3"
    moved = [
        float((new - old).abs().max().detach())
        for new, old in zip(saved.critic.parameters(), loaded.critic.parameters(), strict=True)
    ]
    assert max(moved) > 0
