"""Export of a critic directory, with or without the ``auto_map`` files. Knows nothing about other systems' formats."""

from __future__ import annotations

import shutil
from pathlib import Path

from rlhf_critic.checkpoint import auto_map
from rlhf_critic.checkpoint.critic_directory import RESUME_FOLDER, CriticCard, load_encoder, read_card, verify_critic
from rlhf_critic.checkpoint.interchange import native_class, read_json, write_for_other_readers, write_json
from rlhf_critic.errors import CheckpointError
from rlhf_critic.files import atomic_directory, verify_manifest, write_manifest
from rlhf_critic.model.weights import WeightReader


def export_critic(source: str | Path, out: str | Path, auto_map: bool) -> CriticCard:
    """Copies a critic directory or training checkpoint atomically, without what only resuming needs; returns its card.

    With ``auto_map`` it adds a modeling file, with which ``trust_remote_code=True`` also gives values.

    Raises:
        CheckpointError: The source is not a critic or is damaged, ``out`` exists, or the family has no modeling file.
    """
    source = Path(source)
    card = read_card(source)
    if (source / RESUME_FOLDER).exists():
        verify_manifest(source)
    else:  # an export: without this, damage in the source would get a valid checksum in the copy
        verify_critic(source)
    with atomic_directory(out) as building:
        shutil.copytree(
            source, building, dirs_exist_ok=True, ignore=shutil.ignore_patterns(RESUME_FOLDER, "manifest-*")
        )
        WeightReader(str(building))  # raises for a truncated file
        write_for_other_readers(building)
        load_encoder(building, card)
        if auto_map:
            add_auto_map(building)
        write_manifest(building, 0, 1)
    return card


def add_auto_map(directory: Path) -> None:
    """Adds the family's modeling file to a critic directory, for ``trust_remote_code=True``.

    Raises:
        CheckpointError: The family has no such file.
    """
    config_path = directory / "config.json"
    config = read_json(config_path)
    model_type = config["model_type"]
    if model_type not in auto_map.AUTO_MAP_FAMILIES:
        raise CheckpointError(
            f"there is no auto_map modeling file for model type {model_type!r} (only for "
            f"{', '.join(sorted(auto_map.AUTO_MAP_FAMILIES))}); export without --auto-map, which plain transformers "
            "loads too"
        )
    module, class_name = f"modeling_{model_type}_reward", auto_map.reward_model_class(model_type)
    (directory / f"{module}.py").write_text(auto_map.reward_model_source(model_type), encoding="utf-8")
    # The native class comes first, because vLLM serves the first class that is named.
    config["architectures"] = [native_class(class_name), class_name]
    config["auto_map"] = {"AutoModelForSequenceClassification": f"{module}.{class_name}"}
    write_json(config_path, config)
