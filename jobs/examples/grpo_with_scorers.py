"""GRPO with TRL, its rewards from a running pool of scorers.

    python -m jobs.serve my-critic &
    python jobs/examples/grpo_with_scorers.py POLICY PROMPTS.jsonl http://127.0.0.1:8000

POLICY is a causal language model, PROMPTS.jsonl has a field ``prompt``.
"""

import sys

import torch
from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer

from rlhf_critic.integrations.trl import reward_function
from rlhf_critic.scoring.http_client import connect_http


def main(policy: str, prompts: str, url: str) -> None:
    """Trains the policy and saves it in grpo-policy."""
    trainer = GRPOTrainer(
        model=policy,
        reward_funcs=reward_function(connect_http(url)),
        train_dataset=load_dataset("json", data_files=prompts, split="train"),
        args=GRPOConfig(
            output_dir="grpo-policy",
            num_generations=4,
            per_device_train_batch_size=4,
            max_completion_length=64,
            max_steps=20,
            logging_steps=1,
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
        ),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main(*sys.argv[1:])
