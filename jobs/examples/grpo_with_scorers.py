"""GRPO with TRL and rewards from a running pool of scorers.

    rlhf-critic serve my-critic &
    python jobs/examples/grpo_with_scorers.py POLICY PROMPTS.jsonl http://127.0.0.1:8000

POLICY is a causal language model. Each row of PROMPTS.jsonl has a field ``prompt``.
"""

import sys

import torch
from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer

from rlhf_critic import connect_http
from rlhf_critic.integrations.trl import reward_function


def main(policy: str, prompts: str, url: str) -> None:
    """Trains the policy and saves it in grpo-policy."""
    # 1. Connect to the pool. The client retries lost calls and raises if no reward arrives in time.
    scorers = connect_http(url)

    # 2. Load the prompts.
    dataset = load_dataset("json", data_files=prompts, split="train")

    # 3. Configure a short run: four completions per prompt, 20 steps.
    options = GRPOConfig(
        output_dir="grpo-policy",
        num_generations=4,
        per_device_train_batch_size=4,
        max_completion_length=64,
        max_steps=20,
        logging_steps=1,
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
    )

    # 4. Train. TRL logs the critic's rewards as rewards/critic/mean.
    trainer = GRPOTrainer(model=policy, reward_funcs=reward_function(scorers), train_dataset=dataset, args=options)
    trainer.train()

    # 5. Save the trained policy.
    trainer.save_model()


if __name__ == "__main__":
    main(*sys.argv[1:])
