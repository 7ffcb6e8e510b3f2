"""Encodes conversations with the tokenizers of this environment, as the two calls in docs/checkpoints.md do.

Request: ``directories``, ``messages``.
"""

import json
import sys

from transformers import AutoTokenizer

with open(sys.argv[1], encoding="utf-8") as file:
    request = json.load(file)
answer = {"ids": []}
for directory in request["directories"]:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    texts = [tokenizer.apply_chat_template(turns, tokenize=False) for turns in request["messages"]]
    answer["ids"].append([tokenizer(text, truncation=True)["input_ids"] for text in texts])
with open(sys.argv[2], "w", encoding="utf-8") as file:
    json.dump(answer, file)
