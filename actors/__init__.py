"""Code that runs inside Ray actors. Imports ``rlhf_critic``, never ``jobs``.

The names in ``__all__`` load on first use, so ``import actors`` imports neither Ray nor torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from actors.ppo.critic_group import CriticGroup, CriticOptions
    from actors.serving.handle import connect

__all__ = ["CriticGroup", "CriticOptions", "connect"]
_MODULE_OF = {"CriticGroup": "ppo.critic_group", "CriticOptions": "ppo.critic_group", "connect": "serving.handle"}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used (PEP 562)."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
