"""Merging of adapters that peft saved into their base model, for conversion. Knows nothing about heads or encodings."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from rlhf_critic.checkpoint.interchange import read_json
from rlhf_critic.errors import CheckpointError, ConfigError
from rlhf_critic.model.factory import HEAD_NAME
from rlhf_critic.model.weights import WeightReader

ADAPTER_NAME = "adapter_config.json"
# The model to build around the adapters, by their task. A causal language model has its head in a file of its own.
MODEL_OF_TASK: dict[str, Any] = {"SEQ_CLS": AutoModelForSequenceClassification, "CAUSAL_LM": AutoModelForCausalLM}


@contextmanager
def merged_model(source: str | Path, base: str | None) -> Iterator[tuple[Path, str | None]]:
    """Yields a model's directory, and the directory or hub id of what it lacks: config or tokenizer.

    The directory is the source. If the source has adapters of peft instead of a model, it is a temporary one with the
    base model, in which they are merged in its own dtype. Its pad token is that of the adapters' tokenizer, as trainers
    set it in memory only.

    Raises:
        CheckpointError: The base model is not given, or the adapters do not fit it or lack a trained head.
        ConfigError: peft is missing.
    """
    source = Path(source)
    if not (source / ADAPTER_NAME).is_file():
        yield source, base
        return
    trained_on = read_json(source / ADAPTER_NAME).get("base_model_name_or_path")
    if base is None:
        raise CheckpointError(
            f"{source}: has adapters of peft, trained on {trained_on}: give it with --base BASE_MODEL"
        )
    if importlib.util.find_spec("peft") is None:
        raise ConfigError(f"{source}: adapters need the package peft: pip install 'rlhf-critic[lora]'")
    of_tokenizer = str(source) if (source / "tokenizer_config.json").is_file() else base
    with tempfile.TemporaryDirectory(prefix="rlhf-critic-merged-") as folder:
        directory = Path(folder) / source.resolve().name  # the critic's version has this name
        model = _merge(source, base)
        pad_token_id = AutoTokenizer.from_pretrained(of_tokenizer).pad_token_id
        if pad_token_id is not None:
            model.config.get_text_config().pad_token_id = model.config.pad_token_id = pad_token_id
        model.save_pretrained(directory)
        del model
        for head in source.glob("value_head.*"):
            shutil.copy(head, directory)
        yield directory, of_tokenizer


def _merge(source: Path, base: str) -> PreTrainedModel:
    from peft import PeftConfig, PeftModel

    config = PeftConfig.from_pretrained(str(source))
    model_class = MODEL_OF_TASK.get(str(getattr(config.task_type, "value", config.task_type)))
    if model_class is None:
        raise CheckpointError(
            f"{source}: {ADAPTER_NAME}: task_type: the adapters are for {config.task_type}, and a reward model needs "
            f"{' or '.join(MODEL_OF_TASK)}"
        )
    options = {"num_labels": 1} if model_class is AutoModelForSequenceClassification else {}
    if options and not _has_head(source) and HEAD_NAME not in WeightReader(base).names:
        raise CheckpointError(
            f"{source}: neither the adapters nor --base {base} have a head ({HEAD_NAME}): save the adapters again with "
            "modules_to_save=['score']"
        )
    try:
        model = model_class.from_pretrained(base, dtype="auto", trust_remote_code=False, **options)
        adapted = PeftModel.from_pretrained(model, str(source))
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(
            f"{source}: the adapters cannot be merged into --base {base}: {' '.join(str(error).split())[:500]}"
        ) from error
    with torch.no_grad():
        return adapted.merge_and_unload(safe_merge=True)


def _has_head(source: Path) -> bool:
    """Returns whether the file of the adapters holds the weight of a head."""
    from peft import load_peft_weights

    return any(name.endswith(HEAD_NAME) for name in load_peft_weights(str(source), device="cpu"))
