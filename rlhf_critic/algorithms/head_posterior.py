"""Laplace posterior of a critic's head: how uncertain the rewards are. Pure functions of tensors.

The head is the last linear layer, ``reward = w . phi``, with the last hidden state ``phi`` at the last real token. Its
posterior is a Gaussian around the trained ``w`` (MacKay, "The Evidence Framework Applied to Classification Networks",
1992; the last layer alone: Kristiadi et al., "Being Bayesian, Even Just a Bit, Fixes Overconfidence in ReLU Networks",
2020; as a reward's uncertainty: Zhang et al., "Overcoming Reward Overoptimization via Adversarial Policy Optimization
with Lightweight Uncertainty Estimation", 2024). With the temperature ``T`` of the margins, its precision is::

    H = sum over preferences of p (1 - p) dphi dphi^T + lambda I,    p = sigmoid(margin / T)
    covariance of w = T^2 H^-1

``dphi`` is the state of the chosen side minus that of the rejected one, so H is the Hessian of the Bradley-Terry loss.
Preferences determine differences of rewards only. So the standard deviation of a reward is that of its difference from
the reward at the mean state. The probability that one side wins is MacKay's approximation of the mean sigmoid.

Knows nothing about models, files or ranks.

Shape legend: P preferences, S sequences, D hidden size, K candidates of lambda.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Candidates of lambda, as multiples of the mean eigenvalue of the Hessian.
CANDIDATES = torch.logspace(-4, 4, 17, dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class HeadPosterior:
    """Uncertainty of a critic's rewards.

    Attributes:
        root_DD: Root of the covariance of the head: ``covariance = root root^T``, fp32.
        mean_D: Mean of the last hidden states, fp32.
        temperature: Temperature of margins, ``T``.
        prior_precision: The chosen ``lambda``.
    """

    root_DD: Tensor
    mean_D: Tensor
    temperature: float
    prior_precision: float

    def to(self, device: torch.device | str) -> HeadPosterior:
        """Returns the same posterior on a device."""
        moved = (self.root_DD.to(device), self.mean_D.to(device))
        return HeadPosterior(*moved, self.temperature, self.prior_precision)

    def project(self, states_SD: Tensor) -> Tensor:
        """Computes coordinates fp32 ``[S, D]`` in which the distance of two states is the deviation of their margin.

        Args:
            states_SD: Last hidden states, of any dtype.
        """
        return (states_SD.float() - self.mean_D) @ self.root_DD

    def stds(self, states_SD: Tensor) -> Tensor:
        """Computes the standard deviation of each reward, fp32 ``[S]``, from the last hidden states ``[S, D]``."""
        return self.project(states_SD).norm(dim=-1)


def add_to_hessian(hessian_DD: Tensor, differences_PD: Tensor, logits_P: Tensor) -> None:
    """Adds ``p (1 - p) dphi dphi^T`` of some preferences to the Hessian, in place.

    Args:
        hessian_DD: The Hessian so far, fp32.
        differences_PD: State of the chosen side minus that of the rejected one, of any dtype.
        logits_P: Margins divided by the temperature.
    """
    p_P = torch.sigmoid(logits_P.float())
    scaled_PD = differences_PD.float() * (p_P * (1 - p_P)).sqrt()[:, None]
    hessian_DD.addmm_(scaled_PD.T, scaled_PD)


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Eigenvalues and eigenvectors of a Hessian, which give its inverse for every ``lambda``.

    Attributes:
        values_D: Eigenvalues, fp64, at least 0.
        vectors_DD: Eigenvectors in the columns, fp32.
    """

    values_D: Tensor
    vectors_DD: Tensor

    @classmethod
    def of(cls, hessian_DD: Tensor) -> Spectrum:
        """Decomposes a Hessian, fp32, in about ``9 D^3`` operations and three times its memory."""
        values_D, vectors_DD = torch.linalg.eigh(hessian_DD)
        return cls(values_D.double().clamp(min=0.0), vectors_DD)

    def candidates(self) -> Tensor:
        """Returns the candidates of ``lambda``, fp64 ``[K]``, in ascending order."""
        return CANDIDATES.to(self.values_D.device) * self.values_D.mean()

    def logit_variances(self, differences_PD: Tensor) -> Tensor:
        """Computes the variance of each preference's logit, fp64 ``[P, K]``: ``dphi^T H^-1 dphi`` for each candidate.

        It is the variance of ``margin / temperature``.
        """
        squares_PD = (differences_PD.float() @ self.vectors_DD).square().double()
        return squares_PD @ (1.0 / (self.values_D[:, None] + self.candidates()))

    def posterior(self, mean_D: Tensor, temperature: float, prior_precision: float) -> HeadPosterior:
        """Returns the posterior for one ``lambda``."""
        scale_D = temperature / (self.values_D + prior_precision).sqrt()
        return HeadPosterior(
            (self.vectors_DD * scale_D.float()).contiguous(), mean_D.float(), temperature, prior_precision
        )


def win_logits(margins_P: Tensor, margin_stds_P: Tensor, temperature: float) -> Tensor:
    """Returns logits of the probability that the first side wins, in the dtype of the margins.

    MacKay (1992) approximates the mean of ``sigmoid(x)`` for a Gaussian x as
    ``sigmoid(mean / sqrt(1 + pi variance / 8))``. Here x is ``margin / temperature``.
    """
    return margins_P / (temperature**2 + math.pi / 8 * margin_stds_P**2).sqrt()


def choose_prior_precision(
    candidates_K: Tensor, margins_P: Tensor, variances_PK: Tensor, fit_temperature: Callable[[Tensor], float]
) -> tuple[float, float, Tensor]:
    """Chooses ``lambda`` and the temperature together, by the log-likelihood of validation preferences.

    Args:
        candidates_K: Candidates of ``lambda``, in ascending order.
        margins_P: Chosen minus rejected rewards.
        variances_PK: Variance of each logit for each candidate; see `Spectrum.logit_variances`.
        fit_temperature: Returns the most likely temperature of logits, fp64 ``[P]``.

    Returns:
        The candidate with the lowest mean log-loss, the largest of equals, its temperature, and the mean log-loss of
        each candidate with its temperature, fp64 ``[K]``.
    """
    logits_PK = win_logits(margins_P.double()[:, None], variances_PK.sqrt(), 1.0)
    temperatures = [fit_temperature(logits_P) for logits_P in logits_PK.T]
    losses_K = torch.nn.functional.softplus(-logits_PK / torch.tensor(temperatures)).mean(dim=0)
    best = int((losses_K == losses_K.min()).nonzero()[-1])
    return float(candidates_K[best]), temperatures[best], losses_K
