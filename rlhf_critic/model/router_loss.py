"""Load-balancing loss of the routers in a mixture of experts, for each sequence.

Fedus et al., "Switch Transformers" (2021), equations 4 to 6, as transformers generalises it to several experts a token:
the number of experts times the sum over experts of f * P. Here f is an expert's share of the choices and P its mean
probability, over all layers. Other implementations take both over a micro-batch. Here they are of one sequence, as in
DeepSeek-V3's report (2024). So the loss depends neither on the batch nor on the number of ranks. Knows nothing about
heads or preferences.

Shape legend: S sequences, T computed tokens, E experts, K experts that a token chooses.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_critic.errors import ConfigError
from rlhf_critic.model.backbone import Batch


class RouterRecorder:
    """Records the logits of all routers in forward passes within the ``with`` block.

    Args:
        model: A mixture of experts whose configuration has the weight of this loss.

    Raises:
        ConfigError: The model has no such routers.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        recorded = getattr(model.base_model, "_can_record_outputs", None) or {}
        recorder = recorded.get("router_logits")
        if recorder is None or not hasattr(model.config, "router_aux_loss_coef"):
            raise ConfigError(
                f"train.router_loss_coefficient: the model family {model.config.model_type} has no routers with a "
                "load-balancing loss: set it to 0"
            )
        self._index = recorder.index
        self._routers = [module for module in model.modules() if isinstance(module, recorder.target_class)]
        self._choices = int(model.config.num_experts_per_tok)
        self._handles: list[Any] = []
        self._logits: list[Tensor] = []

    def __enter__(self) -> RouterRecorder:
        self._logits = []
        self._handles = [router.register_forward_hook(self._record) for router in self._routers]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _record(self, module: nn.Module, arguments: Any, output: Any) -> None:
        logits = output[self._index] if isinstance(output, tuple) else output
        self._logits.append(logits.flatten(0, -2).float())

    def loss(self, batch: Batch, lengths: list[int]) -> Tensor:
        """Computes the loss of each sequence of the batch that was run, fp32 ``[S]``, with gradient.

        Args:
            batch: The batch. All layers must have computed all of its tokens.
            lengths: Length of each sequence.
        """
        probs_TE = torch.zeros_like(self._logits[0])
        chosen_TE = torch.zeros_like(self._logits[0])
        for logits_TE in self._logits:
            of_layer_TE = logits_TE.softmax(-1)
            probs_TE = probs_TE + of_layer_TE
            chosen_TE.scatter_add_(1, of_layer_TE.topk(self._choices, -1).indices, torch.ones_like(chosen_TE))
        losses = []
        for row, length in enumerate(lengths):
            tokens = batch.tokens_SL[row, :length]
            scale = length * len(self._logits)
            share_E, mean_E = chosen_TE[tokens].sum(0) / scale, probs_TE[tokens].sum(0) / scale
            losses.append(probs_TE.shape[1] * (share_E * mean_E).sum())
        return torch.stack(losses)
