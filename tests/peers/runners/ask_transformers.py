"""Scores with the transformers of this environment, by a model's own class and by the pipeline as it is.

Request: ``directory``, ``messages``; ``save_to`` to save the loaded model and tokenizer again.
"""

import json
import sys

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

with open(sys.argv[1], encoding="utf-8") as file:
    request = json.load(file)
tokenizer = AutoTokenizer.from_pretrained(request["directory"])
model = AutoModelForSequenceClassification.from_pretrained(request["directory"]).eval()
texts = [tokenizer.apply_chat_template(turns, tokenize=False) for turns in request["messages"]]
answer = {"class": type(model).__name__, "texts": texts, "inputs": list(tokenizer(texts[0]))}
with torch.no_grad():
    alone = [tokenizer(text, truncation=True, return_tensors="pt") for text in texts]
    answer["ids"] = [one["input_ids"][0].tolist() for one in alone]
    answer["alone"] = [model(**one).logits.item() for one in alone]
    for side in ("right", "left"):
        batch = tokenizer(texts, truncation=True, padding=True, padding_side=side, return_tensors="pt")
        answer[side] = model(**batch).logits.squeeze(-1).tolist()
    score = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")
    answer["pipeline"] = [one["score"] for one in score(texts, truncation=True)]
if "save_to" in request:
    model.save_pretrained(request["save_to"])
    tokenizer.save_pretrained(request["save_to"])
with open(sys.argv[2], "w", encoding="utf-8") as file:
    json.dump(answer, file)
