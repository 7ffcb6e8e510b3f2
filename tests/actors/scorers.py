"""Helpers of scorer tests: critics on disk, texts, expected rewards, and concurrent callers."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from actors.serving.handle import connect
from rlhf_critic.checkpoint.critic_directory import CriticCard, EncoderCard, load_critic, save_critic
from rlhf_critic.data.encoding import Encoder, load_tokenizer
from rlhf_critic.model.factory import create_critic_model
from rlhf_critic.scoring.items import Conversation
from rlhf_critic.scoring.local import score_sequences
from tests.helpers import WORDS

MAX_LENGTH = 64
CONVERSATIONS, CONVERSATIONS_A_CALL = 24, 8


def save_tiny_critic(model: str, directory: Path, seed: int = 0, version: str = "tiny@1") -> str:
    """Saves a critic with a random head and a known reward scale; returns its directory."""
    encoder = Encoder(load_tokenizer(model), MAX_LENGTH)
    torch.manual_seed(seed)
    critic = create_critic_model(model, encoder.tokenizer, None)
    card = CriticCard(
        version=version,
        encoder=EncoderCard(fingerprint=encoder.fingerprint, max_length=MAX_LENGTH),
        reward_mean=0.25,
        reward_std=2.0,
        reward_reference="made up",
    )
    save_critic(directory, critic, encoder, card)
    return str(directory)


def make_conversations(count: int, seed: int = 0, prompts: int = 5) -> list[Conversation]:
    """Returns conversations; some share a prompt, some exceed the critic's maximum length."""
    rng = random.Random(seed)

    def words(most: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, most)))

    asked = [words(40) for _ in range(prompts)]
    return [Conversation(rng.choice(asked), words(20)) for _ in range(count)]


def rewards_by_engine(critic: str, items: list[Conversation]) -> NDArray[np.float32]:
    """Returns the rewards of training's forward pass, one item at a time."""
    loaded = load_critic(critic)
    sequences = [one.ids for one in loaded.encoder.encode_batch(items)]
    return np.concatenate([score_sequences(loaded.critic, [ids], token_budget=4096) for ids in sequences])


class Calls:
    """Callers of the pool that compare each answer with the engine's.

    Args:
        critic: Directory of the critic that the pool serves.
        deadline_s: Deadline of each call in seconds.
    """

    def __init__(self, critic: str, deadline_s: float) -> None:
        self.answered = 0
        self.failures: list[str] = []
        self.versions: set[str] = set()
        self.largest_error = 0.0
        self._deadline_s = deadline_s
        self._items = make_conversations(CONVERSATIONS)
        self._expected = rewards_by_engine(critic, self._items)
        self._lock = threading.Lock()

    @contextmanager
    def running(self, callers: int, pause_s: float = 0.0) -> Iterator[None]:
        """Runs callers that repeat their calls until the block ends, then waits for the last calls."""
        enough = threading.Event()
        threads = [threading.Thread(target=self._call, args=(number, pause_s, enough)) for number in range(callers)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            enough.set()
            for thread in threads:
                thread.join()

    def _call(self, first: int, pause_s: float, enough: threading.Event) -> None:
        with connect(deadline_s=self._deadline_s) as client:
            while not enough.wait(pause_s):
                rows = [(first + step) % CONVERSATIONS for step in range(CONVERSATIONS_A_CALL)]
                first += 1
                try:
                    scores = client.score_items([self._items[row] for row in rows])
                except Exception as error:
                    with self._lock:
                        self.failures.append(f"{type(error).__name__}: {error}")
                    continue
                difference = float(np.abs(scores.rewards_S - self._expected[rows]).max())
                with self._lock:
                    self.answered += 1
                    self.versions.add(scores.model_version)
                    self.largest_error = max(self.largest_error, difference)
