"""The file of a head's posterior in a critic directory: written, verified and read.

It lies in a folder of its own. Some servers, such as vLLM, load every safetensors file beside the weights. Plain
transformers and other readers of the directory do not see it. Knows nothing about how a posterior is fitted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rlhf_critic.algorithms.head_posterior import HeadPosterior
from rlhf_critic.errors import CheckpointError
from rlhf_critic.files import atomic_file, record_file
from rlhf_critic.model.factory import HEAD_NAME
from rlhf_critic.model.weights import WeightReader

POSTERIOR_NAME = "uncertainty/head_posterior.safetensors"
FORMAT = "1"


def save_posterior(directory: str | Path, posterior: HeadPosterior, head_1D: Tensor, report: Mapping[str, Any]) -> Path:
    """Writes the posterior of a head into a critic directory, and into its manifest if it has one.

    Args:
        directory: Critic directory, or a directory of another reward model.
        posterior: The posterior.
        head_1D: The head as it is saved, for which alone the posterior holds.
        report: How it was fitted, for people.

    Raises:
        CheckpointError: The directory cannot be written.
    """
    path = Path(directory) / POSTERIOR_NAME
    metadata = {
        "format": FORMAT,
        "temperature": repr(posterior.temperature),
        "prior_precision": repr(posterior.prior_precision),
        "head_sha256": head_digest(head_1D),
        "report": json.dumps(dict(report)),
    }
    tensors = {"root": posterior.root_DD.cpu().contiguous(), "mean": posterior.mean_D.cpu().contiguous()}
    try:
        path.parent.mkdir(exist_ok=True)
        with atomic_file(path) as temporary:
            save_file(tensors, temporary, metadata)
        record_file(directory, POSTERIOR_NAME)
    except OSError as error:
        raise CheckpointError(
            f"{path}: could not be written ({error}); give a directory that can be written"
        ) from error
    return path


def read_posterior(directory: str | Path, reader: WeightReader) -> HeadPosterior | None:
    """Reads the posterior of a critic's head; None if the critic has none.

    Args:
        directory: The critic's directory.
        reader: Reader of its weights.

    Raises:
        CheckpointError: The file is damaged, of a newer version, or of another head.
    """
    path = Path(directory) / POSTERIOR_NAME
    if not path.is_file():
        return None
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise CheckpointError(
                    f"{path}: format {metadata.get('format')}, expected {FORMAT}: upgrade rlhf-critic, or "
                    "calibrate again"
                )
            root_DD, mean_D = file.get_tensor("root"), file.get_tensor("mean")
            temperature, prior_precision = float(metadata["temperature"]), float(metadata["prior_precision"])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged ({error}); calibrate the critic again, or remove the file") from error
    head_1D = reader.read(HEAD_NAME)
    if metadata.get("head_sha256") != head_digest(head_1D):
        raise CheckpointError(
            f"{path}: it was fitted to other weights; fit it again with rlhf-critic calibrate, or remove the file"
        )
    size = head_1D.shape[-1]
    if root_DD.shape != (size, size) or mean_D.shape != (size,) or not torch.isfinite(root_DD).all():
        raise CheckpointError(
            f"{path}: damaged (wrong shape or numbers); calibrate the critic again, or remove the file"
        )
    return HeadPosterior(root_DD.float(), mean_D.float(), temperature, prior_precision)


def head_digest(head_1D: Tensor) -> str:
    """Returns a SHA-256 of a head's weights, of any dtype; equal numbers have equal digests."""
    return hashlib.sha256(head_1D.detach().float().cpu().contiguous().numpy().tobytes()).hexdigest()
