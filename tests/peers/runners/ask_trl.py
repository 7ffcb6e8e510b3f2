"""Trains or evaluates with TRL's RewardTrainer.

Request: ``model``, ``rows`` (chosen and rejected turns); ``steps`` and ``save_to`` to train first and save; ``prompts``
for a step of GRPOTrainer with ``model`` as its reward function and ``policy`` as its policy; ``chat_template``, a file.
"""

import json
import sys

import pyarrow.parquet as pq
import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer

with open(sys.argv[1], encoding="utf-8") as file:
    request = json.load(file)
answer = {}


def train_and_score():
    """Trains for some steps, then scores every row with the trainer's own encoding, batches and model."""
    rows = Dataset.from_list(request["rows"])
    options = {"output_dir": "trainer", "use_cpu": True, "report_to": "none", "save_strategy": "no", "bf16": False}
    options.update(max_length=None, max_steps=request.get("steps", 0), learning_rate=1e-3, disable_tqdm=True)
    options.update(per_device_eval_batch_size=len(rows), gradient_checkpointing=False)
    options.update(chat_template_path=request.get("chat_template"))
    trainer = RewardTrainer(model=request["model"], args=RewardConfig(**options), train_dataset=rows, eval_dataset=rows)
    if request.get("steps"):
        trainer.train()
    answer["metrics"] = trainer.evaluate()
    answer["pad_is_eos"] = trainer.processing_class.pad_token == trainer.processing_class.eos_token
    rewards = []
    with torch.no_grad():
        for inputs in trainer.get_eval_dataloader():
            rewards.append(trainer.model.eval()(**inputs).logits.squeeze(-1))
    chosen, rejected = torch.cat(rewards).chunk(2)
    answer.update(chosen=chosen.tolist(), rejected=rejected.tolist())
    answer["ids"] = [list(ids) for ids in trainer.eval_dataset["chosen_ids"]]
    if "save_to" in request:
        trainer.save_model(request["save_to"])


def grpo():
    """One step of GRPOTrainer whose reward function is the directory; returns what it logged."""
    options = {"output_dir": "grpo", "use_cpu": True, "report_to": "none", "save_strategy": "no", "bf16": False}
    options.update(max_steps=1, num_generations=2, per_device_train_batch_size=4, max_completion_length=8)
    options.update(logging_steps=1, log_completions=True, disable_tqdm=True)
    GRPOTrainer(
        model=request["policy"],
        processing_class=AutoTokenizer.from_pretrained(request["policy"], pad_token="</s>"),
        reward_funcs=request["model"],
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in request["prompts"]]),
        args=GRPOConfig(**options),
    ).train()
    import glob

    table = [row for file in sorted(glob.glob("grpo/completions/*.parquet")) for row in pq.read_table(file).to_pylist()]
    answer["logged"] = [{key: row[key] for key in row if key not in {"step", "advantage"}} for row in table]


if "prompts" in request:
    grpo()
else:
    train_and_score()
with open(sys.argv[2], "w", encoding="utf-8") as file:
    json.dump(answer, file)
