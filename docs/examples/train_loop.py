"""Trains a critic with the library alone: no Ray, no DeepSpeed engine, one process. Reads top to bottom.

    python docs/examples/train_loop.py MODEL train.jsonl my-critic

MODEL is a Hugging Face directory or hub id. Rows of the data have ``prompt``, ``chosen`` and ``rejected``. The loop
over many ranks is ``rlhf_critic/training/critic_engine.py``; under Ray Train it is ``actors/training/worker.py``.

Shape legend: G preferences of a global batch, P of a micro-batch, S sequences.
"""

from __future__ import annotations

import sys

import torch

from rlhf_critic import Encoder, create_critic_model, load_critic, load_tokenizer
from rlhf_critic.algorithms.preference_objective import preference_loss
from rlhf_critic.batching.planner import plan_micro_batches
from rlhf_critic.batching.sampler import DataOrder, steps_in
from rlhf_critic.checkpoint.critic_directory import CriticCard, EncoderCard, save_critic
from rlhf_critic.config.train import TrainConfig
from rlhf_critic.data.preferences import load_preferences
from rlhf_critic.scoring.local import score_sequences

OPTIONS = TrainConfig(learning_rate=1e-4, global_batch_size=8, epochs=1.0)
TOKEN_BUDGET = 1024  # maximum tokens that one micro-batch computes
MAX_LENGTH = 256  # maximum tokens of a sequence; longer ones are truncated from the left


def main(base: str, data: str, out: str) -> float:
    """Trains a critic of ``base`` on ``data``, saves it in ``out`` and returns the accuracy on the training data."""
    # 1. The tokenizer and its chat template. One encoder serves training, evaluation and serving, so that a text
    #    always becomes the same token ids.
    tokenizer = load_tokenizer(base, chat_template="plain")
    encoder = Encoder(tokenizer, MAX_LENGTH, special_tokens_in_text="text")

    # 2. The data: validated row by row, encoded once, memory-mapped from .cache. Counts what was truncated or skipped.
    preferences = load_preferences(data, encoder, cache_dir=".cache")
    print(preferences)

    # 3. The critic: the base model with a new scalar head, dropout off, and a vocabulary that fits the tokenizer.
    torch.manual_seed(OPTIONS.seed)
    critic = create_critic_model(base, tokenizer, None, disable_dropout=True)
    optimizer = torch.optim.AdamW(critic.parameters(), lr=OPTIONS.learning_rate, weight_decay=0.0)

    steps = steps_in(len(preferences), OPTIONS.global_batch_size, OPTIONS.epochs)
    order = DataOrder(preferences.prompts_N, OPTIONS.seed)
    for step in range(steps):
        # 4. The rows of this step: a function of the seed and the step alone, so a resumed run sees the same rows.
        #    Preferences that share a prompt come together.
        rows_G = order.rows_of_step(OPTIONS.global_batch_size, step, OPTIONS.epochs)
        units = [preference.responses for preference in preferences.take(rows_G)]

        # 5. Micro-batches within the token budget. Each becomes one prefix tree: a prompt is computed once for both
        #    of its responses. With more ranks the planner balances them; here there is one.
        (micro_batches,) = plan_micro_batches(units, 1, TOKEN_BUDGET, critic.prefix_tree)

        step_loss = 0.0
        for micro_batch in micro_batches:
            chosen = [units[unit] for unit in micro_batch.units]
            # 6. The forward pass: rewards [S] of all responses, preference by preference, the better one first.
            rewards_S = critic.rewards(critic.batch_of([ids for responses in chosen for ids in responses]))
            # 7. The loss, -log sigmoid(chosen - rejected) for pairs. Dividing by the global batch makes the result
            #    independent of how the batch was cut into micro-batches.
            margins_P = preferences.margins_N[rows_G[list(micro_batch.units)]]
            loss = preference_loss(rewards_S, chosen, margins_P, OPTIONS).loss_P.sum() / len(rows_G)
            loss.backward()
            step_loss += loss.item()

        # 8. One optimizer step for the global batch.
        torch.nn.utils.clip_grad_norm_(critic.parameters(), OPTIONS.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}/{steps} loss {step_loss:.4f}")

    # 9. The critic directory: weights and tokenizer for transformers, and critic.json with the encoder's fingerprint.
    card = CriticCard(version=f"train-loop@{steps}", encoder=EncoderCard.of(encoder))
    save_critic(out, critic, encoder, card)

    # 10. Scoring: load what was saved and compare both sides of every preference.
    loaded = load_critic(out)
    rewards_S = score_sequences(loaded.critic, preferences.responses(), TOKEN_BUDGET)
    comparisons = preferences.comparisons()
    accuracy = float((rewards_S[comparisons.better_P] > rewards_S[comparisons.worse_P]).mean())
    print(f"accuracy on the training data: {accuracy:.3f}; the critic is in {out}")
    return accuracy


if __name__ == "__main__":
    main(*sys.argv[1:4])
