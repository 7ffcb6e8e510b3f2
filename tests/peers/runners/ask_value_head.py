"""Makes TRL's ``AutoModelForCausalLMWithValueHead`` of a model, saves it and gives its values at the last token.

Request: ``model``, ``ids`` (rows of token ids), ``save_to``.
"""

import json
import sys

import torch
from transformers import AutoTokenizer
from trl import AutoModelForCausalLMWithValueHead

with open(sys.argv[1], encoding="utf-8") as file:
    request = json.load(file)
torch.manual_seed(0)
model = AutoModelForCausalLMWithValueHead.from_pretrained(request["model"]).float().eval()
with torch.no_grad():
    model.v_head.summary.weight.normal_(0.0, 0.2)
    model.v_head.summary.bias.fill_(0.3)
    values = [model(input_ids=torch.tensor([ids]))[2][0, -1].item() for ids in request["ids"]]
model.save_pretrained(request["save_to"])
AutoTokenizer.from_pretrained(request["model"]).save_pretrained(request["save_to"])
with open(sys.argv[2], "w", encoding="utf-8") as file:
    json.dump({"values": values}, file)
