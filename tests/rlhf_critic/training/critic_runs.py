"""A short training run of a critic engine on preferences, for every rank."""

from dataclasses import asdict

import numpy as np
import torch

from rlhf_critic.batching.sampler import DataOrder
from rlhf_critic.checkpoint.critic_directory import CriticCard, EncoderCard
from rlhf_critic.config.model import ModelConfig
from rlhf_critic.config.train import TrainConfig
from rlhf_critic.data.encoding import Encoder, load_tokenizer
from rlhf_critic.data.preference_dataset import EncodedPreferences
from rlhf_critic.data.preferences import load_preferences
from rlhf_critic.model.weights import gathered, persistent_tensors
from rlhf_critic.training.critic_engine import CriticEngine

STEPS = 20  # of the schedule
FEW = 8  # as many steps are taken where all 20 would show nothing else
OPTIONS = TrainConfig(
    global_batch_size=12, learning_rate=3e-3, warmup_fraction=0.2, weight_decay=0.01, token_budget=150, epochs=10.0
)


def make(
    source: str, data: str, cache: str, stage: int, dtype: str = "float32", prefix_tree: bool = True, **changes: object
) -> tuple[CriticEngine, EncodedPreferences, Encoder]:
    """Builds the engine, the data and the encoder of one rank."""
    encoder = Encoder(load_tokenizer(source), max_length=64)
    options = OPTIONS.model_copy(update={"zero_stage": stage, **changes})
    model = ModelConfig(path=source, dtype=dtype, prefix_tree=prefix_tree)
    return CriticEngine.from_pretrained(encoder, model, options, STEPS), load_preferences(data, encoder, cache), encoder


def rows_of(preferences: EncodedPreferences, step: int) -> np.ndarray:
    return DataOrder(preferences.prompts_N, OPTIONS.seed).rows_of_step(OPTIONS.global_batch_size, step, OPTIONS.epochs)


def train(engine: CriticEngine, preferences: EncodedPreferences, until: int) -> list[dict]:
    """Takes steps and returns their metrics."""
    return [
        asdict(engine.train_step(preferences, rows_of(preferences, engine.step))) for _ in range(engine.step, until)
    ]


def whole_weights(engine: CriticEngine) -> dict[str, torch.Tensor]:
    weights = {}
    for name, tensor in persistent_tensors(engine.critic.model).items():
        with gathered(tensor):
            weights[name] = tensor.detach().float().clone()
    return weights


def card_of(encoder: Encoder) -> CriticCard:
    return CriticCard(
        version="test@1", encoder=EncoderCard(fingerprint=encoder.fingerprint, max_length=encoder.max_length)
    )
