"""Scores texts with transformers alone. Run as a script in a process where this project cannot be imported.

Arguments: a JSON file of [prompt, response] pairs and the directories of exports. Prints a list of objects.
"""

import json
import sys


class _Blocker:
    """Makes the project's packages impossible to import, wherever they are installed."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"rlhf_critic", "actors", "jobs"}:
            raise ImportError(f"{name} is out of reach in this process")


sys.meta_path.insert(0, _Blocker())

import torch  # noqa: E402
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline  # noqa: E402

pairs_file, *directories = sys.argv[1:]
with open(pairs_file, encoding="utf-8") as file:
    pairs = json.load(file)


def scores_of(directory):
    """Returns the scores of the family's own class and of the shipped class, by every way of calling them."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}], tokenize=False
        )
        for prompt, response in pairs
    ]
    output = {}
    with torch.no_grad():
        for name, trust in (("native", False), ("auto_map", True)):
            model = AutoModelForSequenceClassification.from_pretrained(directory, trust_remote_code=trust).eval()
            output[f"{name}_class"] = type(model).__name__
            for side in ("right", "left"):
                batch = tokenizer(texts, return_tensors="pt", padding=True, truncation=True, padding_side=side)
                answer = model(**batch)
                output[f"{name}_{side}"] = answer.logits.squeeze(-1).tolist()
                if trust:
                    rows = zip(answer.token_values, batch["attention_mask"].bool(), strict=True)
                    output[f"values_{side}"] = [values[real].tolist() for values, real in rows]
            alone = [tokenizer(text, return_tensors="pt", truncation=True) for text in texts]
            output[f"{name}_alone"] = [model(**one).logits.item() for one in alone]
            score = pipeline("text-classification", model=model, tokenizer=tokenizer, function_to_apply="none")
            output[f"{name}_pipeline"] = [one["score"] for one in score(texts, truncation=True)]
            output[f"{name}_pipeline_batched"] = [one["score"] for one in score(texts, truncation=True, batch_size=4)]
        output["values_alone"] = [model(**one).token_values[0].tolist() for one in alone]

    # Training: the shipped class with gradient checkpointing has the gradients of the family's class without it.
    batch = tokenizer(texts[:2], return_tensors="pt", padding=True, truncation=True)
    gradients = {}
    for trust in (False, True):
        model = AutoModelForSequenceClassification.from_pretrained(directory, trust_remote_code=trust).train()
        if trust:
            model.gradient_checkpointing_enable()
        calls = []
        model.score.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        rewards = model(**batch).logits.squeeze(-1)
        torch.nn.functional.softplus(rewards[1] - rewards[0]).backward()
        gradients[trust] = {key: parameter.grad for key, parameter in model.named_parameters()}
    output["head_calls"] = len(calls)
    # DeepSpeed, FSDP and torch.compile iterate over a model's output as a mapping.
    answer = model(**batch)
    output["output_keys"] = list(answer.keys())
    output["output_shapes"] = [list(tensor.shape) for tensor in answer.values()]
    output["batch_shape"] = list(batch["input_ids"].shape)
    assert gradients[True].keys() == gradients[False].keys()
    assert all(gradient is not None for gradient in gradients[True].values())
    output["largest_gradient"] = max(gradient.abs().max().item() for gradient in gradients[False].values())
    output["gradient_error"] = max(
        (gradients[True][key] - gradients[False][key]).abs().max().item() for key in gradients[True]
    )
    output["regression_loss"] = model(**batch, labels=torch.tensor([1.0, 0.0])).loss.item()
    output["regression_target"] = (rewards - torch.tensor([1.0, 0.0])).square().mean().item()
    return output


results = [scores_of(directory) for directory in directories]
try:
    import rlhf_critic  # noqa: F401
except ImportError:
    print(json.dumps(results))
