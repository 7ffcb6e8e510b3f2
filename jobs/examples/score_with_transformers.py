"""Scores texts with an exported critic, transformers and nothing else: an example to copy.

``python score_with_transformers.py EXPORT < texts.json`` reads a JSON list of [prompt, response] pairs and prints the
list of their rewards.
"""

import json
import sys

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer


def main() -> None:
    """Reads pairs, prints rewards."""
    directory = sys.argv[1]
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    rewards = []
    for prompt, response in json.load(sys.stdin):
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        with torch.no_grad():
            rewards.append(model(**tokenizer(text, truncation=True, return_tensors="pt")).logits.item())
    print(json.dumps(rewards))


if __name__ == "__main__":
    main()
