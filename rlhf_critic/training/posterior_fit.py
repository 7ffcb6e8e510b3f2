"""Fit of a head's posterior to preferences: one forward pass over some of them, on one rank or several.

Mathematics are in `rlhf_critic.algorithms.head_posterior`. Memory beside the critic's is about five fp32 matrices of
``D x D`` on the device: 84 MB for D = 2048, 336 MB for 4096, 1.3 GB for 8192. Knows nothing about files, Ray or where
preferences come from.

Shape legend: P preferences, V comparisons of validation preferences, S sequences, D hidden size, K candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlhf_critic.algorithms.head_posterior import (
    HeadPosterior,
    Spectrum,
    add_to_hessian,
    choose_prior_precision,
)
from rlhf_critic.batching.planner import MicroBatch, plan_micro_batches
from rlhf_critic.batching.prefix_tree import TokenIds
from rlhf_critic.data.preference_dataset import EncodedPreferences
from rlhf_critic.errors import DataError
from rlhf_critic.evaluation.calibration import fit_temperature
from rlhf_critic.model.backbone import forward_micro_batches
from rlhf_critic.model.critic import Critic

MAX_PREFERENCES = 10_000  # to fit the Hessian
MAX_VALIDATION = 2_000  # to choose lambda and temperature
MIN_VALIDATION = 20
Unit: TypeAlias = Sequence[TokenIds]  # the responses of a preference with their prompt, the best first
# Yields rewards fp32 [S] and last hidden states [S, D] of the sequences of one unit, on the rank that computes it.
LastStates: TypeAlias = Callable[[Sequence[Unit]], Iterator[tuple[Tensor, Tensor]]]


@dataclass(frozen=True)
class FitReport:
    """How a posterior was fitted.

    Attributes:
        preferences: Number of training preferences in the Hessian.
        scale: Factor on the Hessian: all training preferences divided by those.
        validation: Number of comparisons that chose ``lambda`` and temperature.
        temperature: Temperature of margins, chosen together with ``lambda``.
        prior_precision: The chosen ``lambda``.
        log_loss: Mean validation log-loss of ``sigmoid(margin)``, in nats.
        log_loss_scaled: The same with the most likely temperature and no uncertainty.
        log_loss_uncertain: The same with temperature and uncertainty.
        mean_std: Mean standard deviation of the rewards of validation responses.
    """

    preferences: int
    scale: float
    validation: int
    temperature: float
    prior_precision: float
    log_loss: float
    log_loss_scaled: float
    log_loss_uncertain: float
    mean_std: float

    @property
    def shows_uncertainty(self) -> bool:
        """Whether uncertainty makes the validation preferences more likely. If not, deviations are near 0."""
        return self.log_loss_uncertain < self.log_loss_scaled

    def to_dict(self) -> dict[str, float]:
        """Converts to plain values, for JSON."""
        return asdict(self)


def fit_bytes(hidden_size: int) -> int:
    """Returns the bytes that a fit needs on a device, beside the critic and a forward pass: five fp32 matrices."""
    return 5 * 4 * hidden_size**2


class Ranks:
    """Sums and joins over the ranks of a group. This class has one rank; see `DistributedRanks`.

    Attributes:
        device: Device of sums on a rank that computes nothing.
    """

    device = torch.device("cpu")

    def sum(self, tensor: Tensor) -> None:
        """Sums a tensor over all ranks, in place."""

    def join(self, array: NDArray[np.float64]) -> NDArray[np.float64]:
        """Returns the rows of all ranks."""
        return array


class DistributedRanks(Ranks):
    """The ranks of ``torch.distributed``. Every method is collective."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def sum(self, tensor: Tensor) -> None:
        """See `Ranks.sum`."""
        torch.distributed.all_reduce(tensor)

    def join(self, array: NDArray[np.float64]) -> NDArray[np.float64]:
        """See `Ranks.join`."""
        arrays: list[NDArray[np.float64] | None] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(arrays, array)
        return np.concatenate([one for one in arrays if one is not None])


def plan_units(units: Sequence[Unit], world_size: int, token_budget: int, prefix_tree: bool) -> list[list[MicroBatch]]:
    """Plans whole units, so that the sequences of a unit are computed together. Returns the plan of each rank.

    Units of the returned micro-batches are positions in the flat list of all sequences.
    """
    ends = np.cumsum([len(unit) for unit in units])
    plan = plan_micro_batches(units, world_size, token_budget, prefix_tree)

    def flat(one: MicroBatch) -> MicroBatch:
        places = (range(ends[unit] - len(units[unit]), ends[unit]) for unit in one.units)
        return MicroBatch(tuple(int(place) for of_unit in places for place in of_unit), one.weight)

    return [[flat(one) for one in micro_batches] for micro_batches in plan]


def last_states(
    critic: Critic,
    units: Sequence[Unit],
    micro_batches: Sequence[MicroBatch],
    run: Callable[..., tuple[Tensor, Tensor]],
    device: torch.device | str,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields rewards and last hidden states of each unit of planned micro-batches; see `plan_units`."""
    sequences = [sequence for unit in units for sequence in unit]
    unit_of = np.repeat(np.arange(len(units)), [len(unit) for unit in units])
    for places, (rewards_S, states_SD), _ in forward_micro_batches(
        critic, sequences, micro_batches, lambda batch, _: run(batch), device
    ):
        sizes = [len(units[unit]) for unit in dict.fromkeys(unit_of[list(places)].tolist())]
        yield from zip(rewards_S.float().split(sizes), states_SD.float().split(sizes), strict=True)


def last_states_of(critic: Critic, token_budget: int) -> LastStates:
    """Returns the function that computes last hidden states with an unsharded critic in evaluation mode."""
    device = next(critic.parameters()).device

    def run(units: Sequence[Unit]) -> Iterator[tuple[Tensor, Tensor]]:
        (plan,) = plan_units(units, 1, token_budget, critic.prefix_tree)
        return last_states(critic, units, plan, critic.rewards_and_states, device)

    return run


def sample_units(preferences: EncodedPreferences, maximum: int, seed: int = 0) -> list[Unit]:
    """Returns the responses of at most ``maximum`` random preferences, in the order of the table."""
    rows = np.sort(np.random.default_rng(seed).permutation(len(preferences))[:maximum])
    return [one.responses for one in preferences.take(rows)]


@torch.no_grad()
def fit_head_posterior(
    train: Sequence[Unit],
    validation: Sequence[Unit],
    states_of: LastStates,
    *,
    scale: float = 1.0,
    ranks: Ranks | None = None,
) -> tuple[HeadPosterior, FitReport]:
    """Fits the posterior of a head. Collective.

    The Hessian takes the most likely temperature of the validation margins alone. Then ``lambda`` and temperature of
    the posterior are those whose probabilities with uncertainty are the most likely ones. A ranking counts as all its
    comparisons.

    Args:
        train: Preferences for the Hessian.
        validation: Preferences that choose temperature and ``lambda``; not those that the critic was trained on.
        states_of: Computes rewards and last hidden states of the units of this rank.
        scale: Factor on the Hessian, if ``train`` is a sample.
        ranks: The ranks that compute together.

    Raises:
        DataError: There are too few validation preferences, or all states are equal.
    """
    ranks = ranks or Ranks()
    if len(validation) < MIN_VALIDATION or not train:
        raise DataError(
            f"{len(train)} training and {len(validation)} validation preferences: at least 1 and {MIN_VALIDATION} are "
            "needed to calibrate; give more data"
        )
    parts = [(*_compared(rewards_S, states_SD), states_SD) for rewards_S, states_SD in states_of(validation)]
    margin_parts, difference_parts, state_parts = zip(*parts, strict=True) if parts else ((), (), ())
    all_margins_V = ranks.join(_numbers(margin_parts))
    temperature = fit_temperature(all_margins_V) or 1.0

    hessian_DD = mean_D = None
    count = 0
    for margins_P, differences_PD, states_SD in _chunks(states_of(train)):
        if hessian_DD is None or mean_D is None:
            size = states_SD.shape[1]
            hessian_DD = torch.zeros(size, size, device=states_SD.device)
            mean_D = torch.zeros(size, device=states_SD.device)
        add_to_hessian(hessian_DD, differences_PD, margins_P / temperature)
        mean_D += states_SD.sum(dim=0)
        count += len(states_SD)
    size = int(ranks.join(np.array([0.0 if mean_D is None else len(mean_D)])).max())
    if hessian_DD is None or mean_D is None:  # with fewer preferences than ranks
        hessian_DD, mean_D = torch.zeros(size, size, device=ranks.device), torch.zeros(size, device=ranks.device)
    counted = torch.tensor([float(count)], device=mean_D.device)
    for tensor in (hessian_DD, mean_D, counted):
        ranks.sum(tensor)
    hessian_DD *= scale
    if not torch.isfinite(hessian_DD).all() or not hessian_DD.diagonal().sum() > 0:
        raise DataError(
            "the critic's last hidden states are all equal, NaN or infinite, so its rewards have no measurable "
            "uncertainty; calibrate another critic"
        )
    spectrum = Spectrum.of(hessian_DD)
    del hessian_DD
    candidates_K = spectrum.candidates()
    differences_VD = torch.cat(difference_parts) if difference_parts else mean_D.new_zeros(0, len(mean_D))
    variances_VK = ranks.join(spectrum.logit_variances(differences_VD).cpu().numpy())
    prior_precision, best_temperature, losses_K = choose_prior_precision(
        candidates_K.cpu(),
        torch.from_numpy(all_margins_V),
        torch.from_numpy(variances_VK),
        lambda logits_V: fit_temperature(logits_V.numpy()) or 1.0,
    )
    posterior = spectrum.posterior(mean_D / counted, best_temperature, prior_precision)
    stds = [posterior.stds(states_SD) for states_SD in state_parts]
    report = FitReport(
        preferences=len(train),
        scale=scale,
        validation=len(all_margins_V),
        temperature=best_temperature,
        prior_precision=prior_precision,
        log_loss=float(np.logaddexp(0.0, -all_margins_V).mean()),
        log_loss_scaled=float(np.logaddexp(0.0, -all_margins_V / temperature).mean()),
        log_loss_uncertain=float(losses_K.min()),
        mean_std=float(ranks.join(_numbers(stds)).mean()),
    )
    return posterior, report


def _compared(rewards_S: Tensor, states_SD: Tensor) -> tuple[Tensor, Tensor]:
    """Returns margins and differences of states of all comparisons of one unit, the better side first."""
    better, worse = torch.triu_indices(len(rewards_S), len(rewards_S), 1, device=rewards_S.device)
    return rewards_S[better] - rewards_S[worse], states_SD[better] - states_SD[worse]


def _chunks(units: Iterator[tuple[Tensor, Tensor]], size: int = 256) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Joins margins, differences and states of some units, because one large product is faster than many small ones."""
    waiting: list[tuple[Tensor, Tensor, Tensor]] = []
    for rewards_S, states_SD in units:
        waiting.append((*_compared(rewards_S, states_SD), states_SD))
        if len(waiting) == size:
            yield _joined(waiting)
            waiting = []
    if waiting:
        yield _joined(waiting)


def _joined(parts: Sequence[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    margins, differences, states = zip(*parts, strict=True)
    return torch.cat(margins), torch.cat(differences), torch.cat(states)


def _numbers(tensors: Sequence[Tensor]) -> NDArray[np.float64]:
    return torch.cat(list(tensors)).double().cpu().numpy() if tensors else np.zeros(0)
