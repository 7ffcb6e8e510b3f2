"""On human ratings of real texts, a few layers of a pretrained model learn preferences that generalise."""

import gzip
import math
from itertools import islice
from pathlib import Path

import pytest
import torch

from jobs.quickstart_data import download_model
from rlhf_critic.batching.sampler import DataOrder
from rlhf_critic.config.model import ModelConfig
from rlhf_critic.config.train import TrainConfig
from rlhf_critic.data.encoding import Encoder, load_tokenizer
from rlhf_critic.data.preferences import load_preferences
from rlhf_critic.evaluation.preferences import Evaluation
from rlhf_critic.training.critic_engine import CriticEngine

REPOSITORY = Path(__file__).parents[3]
DATA = REPOSITORY.parent / "shared" / "data"
STEPS = 60
BATCH = 8
HELD_OUT = 120


def fit(model: str, train: str, validation: str, cache: str) -> Evaluation:
    """Trains on this rank, then evaluates."""
    torch.set_num_threads(2)
    encoder = Encoder(load_tokenizer(model), max_length=48)
    preferences, held_out = load_preferences(train, encoder, cache), load_preferences(validation, encoder, cache)
    options = TrainConfig(
        global_batch_size=BATCH, learning_rate=5e-5, warmup_fraction=0.1, zero_stage=0, token_budget=2048
    )
    engine = CriticEngine.from_pretrained(encoder, ModelConfig(path=model, num_layers=4), options, STEPS)
    for step in range(STEPS):
        engine.train_step(preferences, DataOrder(preferences.prompts_N, 0).rows_of_step(BATCH, step, 1.0))
    return engine.evaluate(held_out)


@pytest.mark.slow
@pytest.mark.timeout(900)  # a hang guard: a fresh clone first downloads and converts the model
@pytest.mark.skipif(not DATA.is_dir(), reason=f"real preferences are not at {DATA}")
def test_sixty_steps_lower_the_log_loss_below_a_coins(ranks, tmp_path):
    model = REPOSITORY / ".cache" / "quickstart" / "model"
    download_model(model)
    files = {}
    for split, rows in (("train", STEPS * BATCH), ("test", HELD_OUT)):
        files[split] = tmp_path / f"{split}.jsonl"
        with gzip.open(DATA / f"assistant_prefs_{split}.jsonl.gz", "rt", encoding="utf-8") as lines:
            files[split].write_text("".join(islice(lines, rows)), encoding="utf-8")
    (after,) = ranks(1).run(fit, str(model), str(files["train"]), str(files["test"]), str(tmp_path))
    assert after.log_loss.mean < math.log(2)
    assert after.accuracy.mean > 0.5
    print(f"\nlog-loss {after.log_loss}, accuracy {after.accuracy}, longer wins {after.length_baseline}")
