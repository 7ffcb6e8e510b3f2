"""Model shapes and GPUs that `jobs.plan` knows by name, and the groups of nodes of a cluster's YAML.

Knows nothing about memory or plans.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoConfig, PreTrainedConfig

from rlhf_critic.errors import ConfigError
from rlhf_critic.model.hf_config import load_config
from rlhf_critic.training.memory_planner import Gpu


def _shape(family: str, layers: int, hidden: int, intermediate: int, heads: int, key_values: int, rows: int) -> Any:
    return family, {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": key_values,
        "vocab_size": rows,
        "max_position_embeddings": 8192,
    }


# Shapes from the config.json of SmolLM2-135M, Qwen2.5-0.5B, Llama-3.2-1B and -3B, Llama-3.1-8B, Qwen2.5-14B and -32B,
# Llama-3.1-70B.
SHAPES = {
    "0.1B": _shape("llama", 30, 576, 1536, 9, 3, 49152),
    "0.5B": _shape("qwen2", 24, 896, 4864, 14, 2, 151936),
    "1B": _shape("llama", 16, 2048, 8192, 32, 8, 128256),
    "3B": _shape("llama", 28, 3072, 8192, 24, 8, 128256),
    "8B": _shape("llama", 32, 4096, 14336, 32, 8, 128256),
    "14B": _shape("qwen2", 48, 5120, 13824, 40, 8, 152064),
    "32B": _shape("qwen2", 64, 5120, 27648, 40, 8, 152064),
    "70B": _shape("llama", 80, 8192, 28672, 64, 8, 128256),
}


def model_config(name: str) -> PreTrainedConfig:
    """Returns the config of a known size, a model directory, a ``config.json`` or a hub id.

    Raises:
        CheckpointError: There is no config.
    """
    if name in SHAPES:
        family, shape = SHAPES[name]
        return AutoConfig.for_model(family, **shape)
    return load_config(name)


def _gpu(name: str, gigabytes: int, bfloat16: float, float32: float) -> Gpu:
    return Gpu(name, gigabytes * 10**9, {"bfloat16": bfloat16 * 1e12, "float32": float32 * 1e12})


GPUS = {
    "a10g": _gpu("A10G", 24, 70, 35),
    "l4": _gpu("L4", 24, 121, 30.3),
    "l40s": _gpu("L40S", 48, 362, 91.6),
    "a100-40g": _gpu("A100 40 GB", 40, 312, 19.5),
    "a100-80g": _gpu("A100 80 GB", 80, 312, 19.5),
    "h100": _gpu("H100 SXM", 80, 989, 67),
    "h200": _gpu("H200 SXM", 141, 989, 67),
}


@dataclass(frozen=True)
class NodeGroup:
    """A node type of a cluster that has GPUs.

    Attributes:
        name: Name of the node type in the YAML.
        gpus: Number of GPUs per node.
        max_nodes: Maximum number of nodes that the autoscaler may start.
    """

    name: str
    gpus: int
    max_nodes: int

    def nodes(self, world_size: int) -> int:
        """Returns the number of nodes that give every rank a GPU."""
        return -(-world_size // self.gpus)


def node_groups(path: str) -> list[NodeGroup]:
    """Reads the node types with GPUs from a YAML for ``ray up``.

    Raises:
        ConfigError: The file cannot be read, or no node type has a GPU.
    """
    try:
        cluster = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        types = cluster["available_node_types"]
        most = cluster.get("max_workers", 2)  # Ray's default
        groups = [
            NodeGroup(name, int(kind["resources"]["GPU"]), min(most, kind.get("max_workers", most)))
            for name, kind in types.items()
            if (kind.get("resources") or {}).get("GPU", 0) >= 1
        ]
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: has no readable available_node_types of `ray up`: {error!r}") from error
    if not groups:
        raise ConfigError(f"{path}: no node type has a GPU in its resources; declare them, such as {{CPU: 96, GPU: 8}}")
    return groups
