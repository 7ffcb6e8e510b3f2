"""One training run on a given list of preferences: this project's engine, or TRL's RewardTrainer.

Both take the same weights, the same pairs, 8 an optimizer step, AdamW, clipping at 1, fp32, no gradient checkpointing.
The first two steps warm up; the rest is timed. Grouping by length puts the longest pairs first, into the warm-up, so
speed is counted in tokens of the timed steps and told in pairs of the mean length.
"""

from __future__ import annotations

import os
import tempfile
import time

import datasets
import numpy as np
import torch
import torch.distributed as dist

from benchmarks.harness import Result, Specification, contender, matrix_product_rate
from benchmarks.workloads import PROFILES, draw_prompts, head_weight
from rlhf_critic.config.model import ModelConfig
from rlhf_critic.config.train import TrainConfig
from rlhf_critic.data.encoding import Encoder, load_tokenizer
from rlhf_critic.data.preference_dataset import FEATURES, PREFERENCE, EncodedPreferences, EncodingReport
from rlhf_critic.training.critic_engine import CriticEngine
from rlhf_critic.training.process_group import init_distributed

PAIRS_PER_STEP = 8
WARM_UP_STEPS = 2


def ours(specification: Specification) -> Result:
    """Trains with `CriticEngine.train_step` on one rank, ZeRO-0."""
    os.environ["LOCAL_RANK"] = "0"  # DeepSpeed requires it
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    pairs = pairs_of(specification)
    engine, preferences = build_engine(specification), table_of(pairs)
    with torch.no_grad():
        engine.critic.model.score.weight.copy_(head_weight())
    times, steps = [], []
    for start in range(0, len(pairs), PAIRS_PER_STEP):
        started = time.perf_counter()
        steps.append(engine.train_step(preferences, np.arange(start, start + PAIRS_PER_STEP)))
        times.append(time.perf_counter() - started)
    return {
        "seconds": times[WARM_UP_STEPS:],
        "tokens": sum(step.tokens for step in steps[WARM_UP_STEPS:]),
        "computed_tokens": sum(step.computed_tokens for step in steps[WARM_UP_STEPS:]),
    }


def build_engine(specification: Specification) -> CriticEngine:
    """Returns an engine with a new head; requires initialised ``torch.distributed``."""
    init_distributed("gloo")
    options = TrainConfig(
        zero_stage=specification.get("zero_stage", 0),
        learning_rate=1e-5,
        token_budget=specification.get("token_budget", "auto"),
    )
    encoder = Encoder(load_tokenizer(specification["model"]), max_length=4096)
    return CriticEngine.from_pretrained(encoder, ModelConfig(path=specification["model"]), options, total_steps=1000)


def table_of(pairs: list[tuple[np.ndarray, np.ndarray]]) -> EncodedPreferences:
    """Returns pairs of token ids as a table of encoded preferences."""
    columns = {
        "responses": [[chosen, rejected] for chosen, rejected in pairs],
        "lengths": [[len(chosen), len(rejected)] for chosen, rejected in pairs],
        "margin": [float("nan")] * len(pairs),
        "subset": [""] * len(pairs),
        "line": list(range(1, len(pairs) + 1)),
        "prompt": list(range(len(pairs))),
        "kind": [PREFERENCE] * len(pairs),
        "targets": [[]] * len(pairs),
        "target_tokens": [[]] * len(pairs),
        "content": list(range(len(pairs))),
        "reverse": [-1] * len(pairs),
    }
    table = datasets.Dataset.from_dict(columns, features=FEATURES)
    return EncodedPreferences(table, {"drawn": EncodingReport(len(pairs), len(pairs))}, "drawn")


def trl(specification: Specification) -> Result:
    """Trains with TRL's RewardTrainer; the batch size divides the 8 pairs of a step, and gradients accumulate."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
    from trl import RewardConfig, RewardTrainer
    from trl.trainer.reward_trainer import DataCollatorForPreference

    ends: list[float] = []
    batch_tokens: list[int] = []

    class CountingCollator(DataCollatorForPreference):
        def torch_call(self, examples: list[dict[str, object]]) -> dict[str, object]:
            batch = super().torch_call(examples)
            batch_tokens.append(int(batch["attention_mask"].sum()))
            return batch

    class Clock(TrainerCallback):
        def on_step_end(self, *_: object, **__: object) -> None:
            ends.append(time.perf_counter())

    pairs = pairs_of(specification)
    rows = [{"chosen_ids": c.tolist(), "rejected_ids": r.tolist(), "length": max(len(c), len(r))} for c, r in pairs]
    with tempfile.TemporaryDirectory() as output:
        options = RewardConfig(
            output_dir=output,
            per_device_train_batch_size=specification["batch_size"],
            gradient_accumulation_steps=PAIRS_PER_STEP // specification["batch_size"],
            num_train_epochs=1,
            learning_rate=1e-5,
            max_grad_norm=1.0,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            train_sampling_strategy="group_by_length" if specification["group_by_length"] else "sequential",
            length_column_name="length",
            remove_unused_columns=False,
            max_length=None,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        model = AutoModelForSequenceClassification.from_pretrained(
            specification["model"], num_labels=1, dtype=torch.float32
        )
        with torch.no_grad():
            model.score.weight.copy_(head_weight())
        trainer = RewardTrainer(
            model=model,
            args=options,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(specification["model"]),
            data_collator=CountingCollator(pad_token_id=model.config.pad_token_id),
            callbacks=[Clock()],
        )
        trainer.train()
    warm_up_batches = WARM_UP_STEPS * PAIRS_PER_STEP // specification["batch_size"]
    seconds = np.diff(ends).tolist()[WARM_UP_STEPS - 1 :]
    return {"seconds": seconds, "tokens": sum(batch_tokens[warm_up_batches:])}


def pairs_of(specification: Specification) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns chosen and rejected sequences of every random prompt."""
    drawn = draw_prompts(PROFILES[specification["profile"]], specification["pairs"], 2)
    return [(chosen, rejected) for chosen, rejected in drawn]


def work(specification: Specification) -> Result:
    """Runs the contender and adds the common results."""
    threads = torch.get_num_threads()
    result = {"ours": ours, "trl": trl}[specification["contender"]](specification)
    pairs = pairs_of(specification)
    tokens_a_pair = sum(len(chosen) + len(rejected) for chosen, rejected in pairs) / len(pairs)
    result["pairs_per_second"] = result["tokens"] / sum(result["seconds"]) / tokens_a_pair
    result["matrix_product_rate"] = matrix_product_rate(threads)
    return result


if __name__ == "__main__":
    contender(work)
