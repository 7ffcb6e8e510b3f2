"""rlhf-critic: the reward model and critic of RLHF, the same from training to serving.

The names in ``__all__`` load on first use, so ``import rlhf_critic`` does not import torch. The library knows torch,
transformers, deepspeed and datasets. It never imports Ray, ``actors`` or ``jobs``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_critic.checkpoint.critic_directory import load_critic
    from rlhf_critic.data.encoding import Encoder, load_tokenizer
    from rlhf_critic.model.factory import create_critic_model, create_hf_model
    from rlhf_critic.scoring.client import ScorerClient
    from rlhf_critic.scoring.http_client import connect_http

__version__ = "0.1.0"
__all__ = [
    "Encoder",
    "ScorerClient",
    "connect_http",
    "create_critic_model",
    "create_hf_model",
    "load_critic",
    "load_tokenizer",
]
_MODULE_OF = {
    "Encoder": "data.encoding",
    "ScorerClient": "scoring.client",
    "connect_http": "scoring.http_client",
    "create_critic_model": "model.factory",
    "create_hf_model": "model.factory",
    "load_critic": "checkpoint.critic_directory",
    "load_tokenizer": "data.encoding",
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used (PEP 562)."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
