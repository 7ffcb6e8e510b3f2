"""Scores with OpenRLHF's reward model and data set, or asks a server as its executor does.

Request: ``model``, ``texts``; ``rows`` and ``keys`` for its RewardDataset; ``train_to`` to save a reward model with a
new head made from ``model`` (``is_last``: as the last checkpoint); or ``url`` with ``prompts`` and ``responses`` for
its executor.
"""

import asyncio
import json
import sys
import types
from importlib.machinery import ModuleSpec

import torch

with open(sys.argv[1], encoding="utf-8") as file:
    request = json.load(file)
answer = {}


def without_flash_attention():
    """Lets OpenRLHF import without the GPU package flash_attn, which it uses for packed samples only."""
    for name, functions in {
        "flash_attn": [],
        "flash_attn.bert_padding": ["index_first_axis", "pad_input", "rearrange", "unpad_input"],
        "flash_attn.utils": [],
        "flash_attn.utils.distributed": ["all_gather"],
    }.items():
        module = sys.modules.setdefault(name, types.ModuleType(name))
        module.__spec__ = ModuleSpec(name, None)
        for function in functions:
            setattr(module, function, None)


def judge():
    """Scores texts as its server does, and rows as its trainer encodes them."""
    without_flash_attention()
    from datasets import Dataset
    from openrlhf.datasets import RewardDataset
    from openrlhf.models import get_llm_for_sequence_regression
    from openrlhf.utils import utils

    utils.convert_to_torch_dtype = lambda _: torch.float32  # its options are bf16 and fp16, which compare to 1e-2
    torch.manual_seed(0)
    new = "train_to" in request
    model = get_llm_for_sequence_regression(
        request["model"], "reward", attn_implementation="sdpa", init_value_head=new
    ).eval()
    tokenizer = utils.get_tokenizer(request["model"], model, "left", None)
    answer["pad_is_eos"] = tokenizer.pad_token_id == tokenizer.eos_token_id
    if new:
        with torch.no_grad():
            model.score.weight.normal_(0.0, 0.2)
        if request.get("is_last", True):
            model.config.value_head_prefix = "score"  # as its train_rm does before it saves the last checkpoint
        model.save_pretrained(request["train_to"])
        tokenizer.save_pretrained(request["train_to"])
    with torch.no_grad():
        if request.get("texts"):
            options = {"add_special_tokens": False, "max_length": 512, "padding": True, "truncation": True}
            batch = tokenizer(request["texts"], return_tensors="pt", **options)
            answer["scores"] = model(batch["input_ids"], batch["attention_mask"]).tolist()
        if request.get("rows"):
            strategy = types.SimpleNamespace(args=types.SimpleNamespace(data=types.SimpleNamespace(**request["keys"])))
            data = RewardDataset(Dataset.from_list(request["rows"]), tokenizer, 512, strategy, num_processors=1)
            chosen, chosen_mask, rejected, rejected_mask, _ = data.collate_fn([data[row] for row in range(len(data))])
            answer["chosen"] = model(chosen.squeeze(1), chosen_mask.squeeze(1)).tolist()
            answer["rejected"] = model(rejected.squeeze(1), rejected_mask.squeeze(1)).tolist()
            answer["ids"] = [data[row][0][0].tolist() for row in range(len(data))]


class _Engine:
    """An engine that answers with given tokens in place of vLLM's."""

    def __init__(self, ids):
        self._ids = ids

    async def generate(self, prompt_ids, sampling, multi_modal_data=None):
        output = types.SimpleNamespace(token_ids=self._ids, finish_reason="stop", logprobs=None)
        return types.SimpleNamespace(outputs=[output])


async def ask():
    """Lets its single-turn executor fetch rewards over HTTP for one rollout after another."""
    from openrlhf.utils import agent
    from openrlhf.utils.agent import SingleTurnAgentExecutor
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(request["model"])
    executor = SingleTurnAgentExecutor(request["url"])
    sampling = types.SimpleNamespace(max_tokens=64, logprobs=None)
    answer.update(rewards=[], scores=[], logged=[])
    agent.logger.info = answer["logged"].append
    for prompt, response in zip(request["prompts"], request["responses"], strict=True):
        ids = tokenizer(response, add_special_tokens=False)["input_ids"]
        output = await executor.execute(prompt, None, sampling, 512, tokenizer, _Engine(ids))
        if output["reward"] is not None:
            answer["rewards"].append(output["reward"][0])
            answer["scores"].append(output["scores"][0])


if "url" in request:
    asyncio.run(ask())
else:
    judge()
with open(sys.argv[2], "w", encoding="utf-8") as file:
    json.dump(answer, file)
