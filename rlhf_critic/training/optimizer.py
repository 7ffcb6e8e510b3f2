"""Optimizers: AdamW, or Muon for matrices with AdamW for the rest. Knows nothing about losses or DeepSpeed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from rlhf_critic.config.model import OptimizerConfig
from rlhf_critic.model.weights import full_shape

MUON_MOMENTUM = 0.95


def create_optimizer(module: nn.Module, options: OptimizerConfig) -> torch.optim.Optimizer:
    """Returns the optimizer of a module's trained parameters."""
    if options.optimizer == "muon":
        return MuonWithAdamW(module, options)
    return _adamw(parameter_groups(module, options.weight_decay), options)


def parameter_groups(
    module: nn.Module, weight_decay: float, without: frozenset[int] = frozenset()
) -> list[dict[str, Any]]:
    """Returns the optimizer groups. Decay applies to matrices, not to norms and biases; empty groups are omitted.

    ``without`` are the ids of parameters that another optimizer updates.
    """
    groups = []
    trained = [one for one in module.parameters() if one.requires_grad and id(one) not in without]
    for is_matrix, decay in ((True, weight_decay), (False, 0.0)):
        parameters = [one for one in trained if (len(full_shape(one)) > 1) == is_matrix]
        groups.append({"params": parameters, "weight_decay": decay})
    return [group for group in groups if group["params"]]


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for hidden matrices, and AdamW for embeddings, the head, vectors and tensors of experts, as one optimizer.

    Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024). Updates are scaled as in Liu et
    al., "Muon is scalable for LLM training" (2025), so that both take the same learning rate. The two share groups and
    state with this optimizer, which schedules change and checkpoints save.
    """

    def __init__(self, module: nn.Module, options: OptimizerConfig) -> None:
        hidden = hidden_matrices(module)
        others = parameter_groups(module, options.weight_decay, frozenset(map(id, hidden)))
        self._muon = torch.optim.Muon(
            hidden,
            lr=options.learning_rate,
            weight_decay=options.weight_decay,
            momentum=MUON_MOMENTUM,
            adjust_lr_fn="match_rms_adamw",
        )
        self._adamw = _adamw(others, options)
        super().__init__([*self._muon.param_groups, *self._adamw.param_groups], {})
        self._share()

    def _share(self) -> None:
        first = len(self._muon.param_groups)
        self._muon.param_groups, self._adamw.param_groups = self.param_groups[:first], self.param_groups[first:]
        self._muon.state = self._adamw.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` returned."""
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Updates all parameters once; takes no closure."""
        assert closure is None
        self._muon.step()
        self._adamw.step()


def hidden_matrices(module: nn.Module) -> list[nn.Parameter]:
    """Returns the trained matrices of a backbone between its embeddings and its head."""
    model: Any = getattr(module, "model", module)
    tables = [one.weight for one in module.modules() if isinstance(one, nn.Embedding)]
    ends = [getattr(head, "weight", None) for head in (getattr(model, "score", None), model.get_output_embeddings())]
    excluded = {id(one) for one in (*tables, *ends)}
    return [one for one in module.parameters() if one.requires_grad and one.dim() == 2 and id(one) not in excluded]


def _adamw(groups: list[dict[str, Any]], options: OptimizerConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        groups,
        lr=options.learning_rate,
        betas=(options.adam_beta1, options.adam_beta2),
        eps=options.adam_epsilon,
        fused=True,  # one pass over memory instead of six
    )
