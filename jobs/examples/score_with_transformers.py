"""Scores texts with an exported critic and plain transformers, without this project. Copy it where you need it.

``python score_with_transformers.py EXPORT < texts.json`` reads a JSON list of [prompt, response] pairs and prints their
rewards as a JSON list.
"""

import json
import sys

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer


def main() -> None:
    """Reads pairs from standard input and prints their rewards."""
    # 1. Load the tokenizer, which carries the chat template and the length limit, and the model.
    directory = sys.argv[1]
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()

    rewards = []
    for prompt, response in json.load(sys.stdin):
        # 2. Render the conversation with the critic's chat template.
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        text = tokenizer.apply_chat_template(messages, tokenize=False)

        # 3. Truncate from the left, as in training. The model's single logit is the reward.
        with torch.no_grad():
            rewards.append(model(**tokenizer(text, truncation=True, return_tensors="pt")).logits.item())

    # 4. Print the rewards in the order of the pairs.
    print(json.dumps(rewards))


if __name__ == "__main__":
    main()
