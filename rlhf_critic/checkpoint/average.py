"""Average of the weights of several critics, which must start from one base model and read texts alike.

Source: Rame et al., "WARM: On the Benefits of Weight Averaged Reward Models" (2024). Knows nothing about
training or scoring.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from rlhf_critic.checkpoint.critic_directory import CARD_NAME, RESUME_FOLDER, CriticCard, OpenedCritic, open_critic
from rlhf_critic.checkpoint.posterior_file import POSTERIOR_NAME
from rlhf_critic.errors import CheckpointError
from rlhf_critic.files import atomic_directory, write_manifest, write_text_atomically
from rlhf_critic.model.hf_config import load_config

# Keys of a config that do not decide how weights are used.
FREE_KEYS = frozenset({"_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "auto_map"})


def average_critics(sources: Sequence[str | Path], out: str | Path) -> CriticCard:
    """Writes a critic whose weights are the mean of several critics' weights. Returns its card.

    The mean is computed in fp64, file by file, and saved in the dtype of the first critic. The new critic has neither
    reward mean nor posterior, because those of the sources do not hold for it.

    Raises:
        CheckpointError: There are fewer than two critics, one is damaged, or they do not fit together; or ``out``
            exists.
    """
    if len(sources) < 2:
        raise CheckpointError(f"{len(sources)} critics cannot be averaged; give two or more")
    opened = [open_critic(source) for source in sources]
    for other in opened[1:]:
        check_same_kind(opened[0], other)
    first = opened[0]
    card = CriticCard(
        version=f"average({', '.join(one.card.version for one in opened)})",
        encoder=first.card.encoder,
        num_padding_at_beginning=first.card.num_padding_at_beginning,
        training={"averaged": [one.card.version for one in opened]},
    )
    left_out = (RESUME_FOLDER, "manifest-*", "*.safetensors", Path(POSTERIOR_NAME).parts[0], CARD_NAME)
    ignored = shutil.ignore_patterns(*left_out)
    with atomic_directory(out) as building:
        shutil.copytree(first.directory, building, dirs_exist_ok=True, ignore=ignored)
        for path in first.reader.files:
            with safe_open(str(path), framework="pt") as file:
                means = {name: _mean(opened, name) for name in file.keys()}  # noqa: SIM118
            save_file(means, building / path.name, {"format": "pt"})
        write_text_atomically(building / CARD_NAME, card.model_dump_json(indent=2))
        write_manifest(building, 0, 1)
    return card


def check_same_kind(first: OpenedCritic, other: OpenedCritic) -> None:
    """Checks that two critics encode texts alike and have the same architecture and weights.

    Raises:
        CheckpointError: They differ. Names what differs.
    """
    if first.encoder.fingerprint != other.encoder.fingerprint:
        raise CheckpointError(
            f"{other.directory}: encodes texts in another way than {first.directory} (fingerprint "
            f"{other.encoder.fingerprint[:12]}, expected {first.encoder.fingerprint[:12]}): average critics that were "
            "trained with the same tokenizer, chat template, length limit and special_tokens_in_text"
        )
    configs = [load_config(one.directory).to_dict() for one in (first, other)]
    keys = (configs[0].keys() | configs[1].keys()) - FREE_KEYS
    differing = sorted(key for key in keys if configs[0].get(key) != configs[1].get(key))
    shapes = [{name: one.reader.shape(name) for name in one.reader.names} for one in (first, other)]
    names = shapes[0].keys() | shapes[1].keys()
    differing += sorted(name for name in names if shapes[0].get(name) != shapes[1].get(name))
    if differing:
        raise CheckpointError(
            f"{other.directory}: is another kind of model than {first.directory} (different: "
            f"{', '.join(differing[:5])}): average critics that started from one base model"
        )


def _mean(opened: Sequence[OpenedCritic], name: str) -> torch.Tensor:
    tensors = [one.reader.read(name) for one in opened]
    total = torch.zeros_like(tensors[0], dtype=torch.float64)
    for tensor in tensors:
        total += tensor
    return (total / len(tensors)).to(tensors[0].dtype).contiguous()
