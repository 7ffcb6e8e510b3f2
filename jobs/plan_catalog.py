"""Model shapes and GPUs that `jobs.plan` knows by name, and the groups of nodes of a cluster's YAML.

Knows nothing about memory or plans.
"""

from __future__ import annotations

from dataclasses import dataclass

import yaml
from transformers import AutoConfig, PreTrainedConfig

from rlhf_critic.errors import ConfigError
from rlhf_critic.files import read_text
from rlhf_critic.model.hf_config import load_config
from rlhf_critic.training.memory_planner import Gpu

GB = 10**9
SHAPE_OPTIONS = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
# Shapes from the config.json of SmolLM2-135M, Qwen2.5-0.5B, Llama-3.2-1B and -3B, Llama-3.1-8B, Qwen2.5-14B and -32B,
# Llama-3.1-70B.
SHAPES = {
    "0.1B": ("llama", (30, 576, 1536, 9, 3, 49152)),
    "0.5B": ("qwen2", (24, 896, 4864, 14, 2, 151936)),
    "1B": ("llama", (16, 2048, 8192, 32, 8, 128256)),
    "3B": ("llama", (28, 3072, 8192, 24, 8, 128256)),
    "8B": ("llama", (32, 4096, 14336, 32, 8, 128256)),
    "14B": ("qwen2", (48, 5120, 13824, 40, 8, 152064)),
    "32B": ("qwen2", (64, 5120, 27648, 40, 8, 152064)),
    "70B": ("llama", (80, 8192, 28672, 64, 8, 128256)),
}


def model_config(name: str) -> PreTrainedConfig:
    """Returns the config of a known size, a model directory, a ``config.json`` or a hub id.

    Raises:
        CheckpointError: There is no config.
    """
    if name in SHAPES:
        family, shape = SHAPES[name]
        options = dict(zip((*SHAPE_OPTIONS, "vocab_size"), shape, strict=True))
        return AutoConfig.for_model(family, **options, max_position_embeddings=8192)
    return load_config(name)


GPUS = {
    "a10g": Gpu("A10G", 24 * GB, {"bfloat16": 70e12, "float32": 35e12}),
    "l4": Gpu("L4", 24 * GB, {"bfloat16": 121e12, "float32": 60e12}),
    "l40s": Gpu("L40S", 48 * GB, {"bfloat16": 362e12, "float32": 183e12}),
    "a100-40g": Gpu("A100 40 GB", 40 * GB, {"bfloat16": 312e12, "float32": 156e12}),
    "a100-80g": Gpu("A100 80 GB", 80 * GB, {"bfloat16": 312e12, "float32": 156e12}),
    "h100": Gpu("H100 SXM", 80 * GB, {"bfloat16": 989e12, "float32": 494e12}),
    "h200": Gpu("H200 SXM", 141 * GB, {"bfloat16": 989e12, "float32": 494e12}),
}


@dataclass(frozen=True)
class NodeGroup:
    """A node type of a cluster's YAML that has GPUs: its name, its GPUs per node and the most nodes that may start."""

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
        cluster = yaml.safe_load(read_text(path))
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
