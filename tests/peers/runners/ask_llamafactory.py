"""Trains a reward model with LLaMA-Factory's own parts, as its ``run_rm`` does, saves it and scores every row.

Request: ``model``, ``rows`` (instruction, chosen, rejected), ``steps``, ``save_to``; ``adapters`` trains adapters.
"""

import json
import os
import sys
import types
from importlib.machinery import ModuleSpec

os.environ["DISABLE_VERSION_CHECK"] = "1"
# It loads audio with this package, whose builds are for GPUs.
sys.modules["torchaudio"] = types.ModuleType("torchaudio")
sys.modules["torchaudio"].__spec__ = ModuleSpec("torchaudio", None)

import torch  # noqa: E402
from llamafactory.data import (  # noqa: E402
    PairwiseDataCollatorWithPadding,
    get_dataset,
    get_template_and_fix_tokenizer,
)
from llamafactory.hparams import get_train_args  # noqa: E402
from llamafactory.model import load_model, load_tokenizer  # noqa: E402
from llamafactory.train.callbacks import fix_valuehead_checkpoint  # noqa: E402
from llamafactory.train.rm.trainer import PairwiseTrainer  # noqa: E402

with open(sys.argv[1], encoding="utf-8") as file:
    request = json.load(file)
os.makedirs("data", exist_ok=True)
columns = {"prompt": "instruction", "query": "input", "chosen": "chosen", "rejected": "rejected"}
with open("data/dataset_info.json", "w", encoding="utf-8") as file:
    json.dump({"rows": {"file_name": "rows.json", "ranking": True, "columns": columns}}, file)
with open("data/rows.json", "w", encoding="utf-8") as file:
    json.dump([{"input": "", **row} for row in request["rows"]], file)
options = {
    "model_name_or_path": request["model"],
    "stage": "rm",
    "finetuning_type": "lora" if request.get("adapters") else "full",
    "dataset": "rows",
    "dataset_dir": "data",
    "template": "default",
    "cutoff_len": 512,
    "output_dir": request["save_to"],
    "do_train": True,
    "max_steps": request["steps"],
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 2,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
}
model_args, data_args, training_args, finetuning_args, _ = get_train_args(options)
parts = load_tokenizer(model_args)
template = get_template_and_fix_tokenizer(parts["tokenizer"], data_args)
rows = get_dataset(template, model_args, data_args, training_args, stage="rm", **parts)["train_dataset"]
model = load_model(parts["tokenizer"], model_args, finetuning_args, True, add_valuehead=True).float()
with torch.no_grad():
    model.v_head.summary.weight.normal_(0.0, 0.2)
collator = PairwiseDataCollatorWithPadding(template=template, model=model, pad_to_multiple_of=8, **parts)
trainer = PairwiseTrainer(
    model=model,
    args=training_args,
    finetuning_args=finetuning_args,
    data_collator=collator,
    train_dataset=rows,
    **parts,
)
trainer.train()
trainer.save_model()
answer = {
    "chosen": [],
    "rejected": [],
    "chosen_ids": [row["chosen_input_ids"] for row in rows],
    "rejected_ids": [row["rejected_input_ids"] for row in rows],
}
model.eval()
with torch.no_grad():
    for row in rows:
        _, (_, chosen, rejected) = trainer.compute_loss(model, collator([row]), return_outputs=True)
        answer["chosen"].append(chosen.item())
        answer["rejected"].append(rejected.item())
fix_valuehead_checkpoint(model, request["save_to"], True)
with open(sys.argv[2], "w", encoding="utf-8") as file:
    json.dump(answer, file)
