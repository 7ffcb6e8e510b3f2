"""Export of a critic directory, with or without the ``auto_map`` files. Knows nothing of other systems' formats."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from rlhf_critic.checkpoint import auto_map
from rlhf_critic.checkpoint.critic_directory import RESUME_FOLDER, CriticCard, load_encoder, read_card, verify_critic
from rlhf_critic.errors import CheckpointError
from rlhf_critic.files import atomic_directory, verify_manifest, write_manifest, write_text_atomically
from rlhf_critic.model.weights import WeightReader


def export_critic(source: str | Path, out: str | Path, auto_map: bool) -> CriticCard:
    """Copies a critic directory without what only a resumed run needs, in one step: whole or not at all.

    Args:
        source: A critic directory or training checkpoint.
        out: A directory that does not exist yet.
        auto_map: Whether to ship a modeling file, so that ``trust_remote_code=True`` gives values too.

    Returns:
        The card of the exported critic.

    Raises:
        CheckpointError: The source is no critic, ``out`` exists, or the family has no modeling file.
    """
    source = Path(source)
    card = read_card(source)
    if (source / RESUME_FOLDER).exists():
        verify_manifest(source)
    else:  # exported before: what is copied gets checksums of its own, under which damage would be lost
        verify_critic(source)
    with atomic_directory(out) as building:
        shutil.copytree(source, building, dirs_exist_ok=True, ignore=_ignore_resume_state)
        load_encoder(building, card)
        WeightReader(str(building))  # refuses a file that was cut short
        if auto_map:
            add_auto_map(building)
        write_manifest(building, 0, 1)
    return card


def _ignore_resume_state(_: str, names: list[str]) -> list[str]:
    return [name for name in names if name == RESUME_FOLDER or name.startswith("manifest-")]


def add_auto_map(directory: Path) -> None:
    """Ships the family's modeling file in a critic directory, for ``trust_remote_code=True``.

    Raises:
        CheckpointError: The family has no such file.
    """
    config_path = directory / "config.json"
    config = json.loads(config_path.read_text(encoding="utf-8"))
    model_type = config["model_type"]
    if model_type not in auto_map.AUTO_MAP_FAMILIES:
        raise CheckpointError(
            f"there is no auto_map modeling file for model type {model_type!r} (only for "
            f"{', '.join(sorted(auto_map.AUTO_MAP_FAMILIES))}); export without --auto-map: plain transformers loads that too"
        )
    module, class_name = f"modeling_{model_type}_reward", auto_map.reward_model_class(model_type)
    (directory / f"{module}.py").write_text(auto_map.reward_model_source(model_type), encoding="utf-8")
    config["architectures"] = [class_name]
    config["auto_map"] = {"AutoModelForSequenceClassification": f"{module}.{class_name}"}
    write_text_atomically(config_path, json.dumps(config, indent=2, sort_keys=True) + "\n")
