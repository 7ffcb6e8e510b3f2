"""Config files of a critic directory, in the spellings that other programs read.

vLLM, infinity and transformers' pipeline apply a sigmoid unless ``problem_type`` is ``regression``, and vLLM serves the
first class of ``architectures``. transformers 4 does not know the names that transformers 5 writes: it loads no
tokenizer, and computes other positions without an error. So the older names are written beside the new ones. Knows
nothing about weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlhf_critic.errors import CheckpointError
from rlhf_critic.files import write_text_atomically

NATIVE_SUFFIX = "ForSequenceClassification"
SHIPPED_SUFFIX = "RewardModel"
# The class that reads tokenizer.json as it is, by its name in both versions. A family's own class adds BOS to texts in
# transformers 4 (Llama, Gemma), or is unknown there (transformers 5 has others).
TOKENIZER_CLASS = "PreTrainedTokenizerFast"
MODEL_INPUT_NAMES = ["input_ids", "attention_mask"]
# Entries of rope_parameters that are fields of their own in transformers 4, and their names there.
ROPE_FIELDS = {"rope_theta": "rope_theta", "partial_rotary_factor": "partial_rotary_factor"}
ROPE_FIELDS_OF = {"gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}}


def write_for_other_readers(directory: Path) -> None:
    """Adds what other programs read to the config files of a critic directory, and removes an ``auto_map``.

    Raises:
        CheckpointError: A file is not JSON.
    """
    path = directory / "config.json"
    config = read_json(path)
    config["architectures"] = [native_class(name) for name in (config.get("architectures") or [])[:1]]
    config["problem_type"] = "regression"
    if config.pop("auto_map", None) is not None:
        for modeling_file in directory.glob("modeling_*_reward.py"):
            modeling_file.unlink()
    _add_older_names(config)
    write_json(path, config)
    path = directory / "tokenizer_config.json"
    if path.is_file():
        names = {"model_input_names": MODEL_INPUT_NAMES, "tokenizer_class": TOKENIZER_CLASS}
        write_json(path, {**read_json(path), **names})


def native_class(name: str) -> str:
    """Returns the family's own class for the name of that class, or of the class that ``auto_map`` ships."""
    return name.removesuffix(SHIPPED_SUFFIX) + NATIVE_SUFFIX if name.endswith(SHIPPED_SUFFIX) else name


def read_json(path: Path) -> dict[str, Any]:
    """Reads a config.

    Raises:
        CheckpointError: It is not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a valid config: {error}; restore the file") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a valid config: expected an object; restore the file")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a config in the layout of transformers, atomically."""
    write_text_atomically(path, json.dumps(content, indent=2, sort_keys=True) + "\n")


def _add_older_names(config: dict[str, Any]) -> None:
    """Adds the names of transformers 4 to a config and to the configs inside it."""
    if config.get("dtype"):
        config["torch_dtype"] = config["dtype"]
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and rope:
        _add_older_rope(config, rope)
    for value in config.values():
        if isinstance(value, dict) and "model_type" in value:
            _add_older_names(value)


def _add_older_rope(config: dict[str, Any], rope: dict[str, Any]) -> None:
    """Adds the names of transformers 4 for rotary positions."""
    of_layers = {kind: entry for kind, entry in rope.items() if isinstance(entry, dict)}
    if of_layers:  # an entry for each kind of layer, as in Gemma 3
        local = of_layers.get("sliding_attention", {})
        if "rope_theta" in local:
            config["rope_local_base_freq"] = local["rope_theta"]
        rope = of_layers.get("full_attention") or next(iter(of_layers.values()))
    for entry, name in ROPE_FIELDS_OF.get(config.get("model_type", ""), ROPE_FIELDS).items():
        if rope.get(entry) is not None:
            config[name] = rope[entry]
    kind = rope.get("rope_type", "default")
    scaling = {entry: value for entry, value in rope.items() if entry not in ROPE_FIELDS and value is not None}
    if config.get("model_type") == "phi3":  # accepts exactly these
        scaling = {"type": kind, **{entry: rope[entry] for entry in ("short_factor", "long_factor") if entry in rope}}
    config["rope_scaling"] = None if kind == "default" else scaling
