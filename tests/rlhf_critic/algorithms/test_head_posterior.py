"""The posterior of a head equals its definition on small numbers, and finds the truth of synthetic preferences."""

import math

import numpy as np
import pytest
import torch

from rlhf_critic.algorithms.head_posterior import (
    HeadPosterior,
    Spectrum,
    add_to_hessian,
    choose_prior_precision,
    win_logits,
)

D = 5


def hessian_by_definition(differences, logits) -> np.ndarray:
    """Second derivatives of the Bradley-Terry loss, preference by preference and entry by entry."""
    hessian = np.zeros((D, D))
    for difference, logit in zip(differences, logits, strict=True):
        p = 1 / (1 + math.exp(-logit))
        for i in range(D):
            for j in range(D):
                hessian[i, j] += p * (1 - p) * difference[i] * difference[j]
    return hessian


@pytest.fixture
def fitted():
    """Returns states, a spectrum of their Hessian, and the Hessian by its definition."""
    rng = np.random.default_rng(0)
    differences = rng.normal(size=(40, D)).astype(np.float32)
    logits = rng.normal(size=40).astype(np.float32)
    hessian = torch.zeros(D, D)
    for part in (slice(0, 13), slice(13, 40)):  # in parts, as a pass over data adds them
        add_to_hessian(hessian, torch.from_numpy(differences[part]), torch.from_numpy(logits[part]))
    return differences, Spectrum.of(hessian), hessian_by_definition(differences, logits), hessian


def test_the_hessian_is_that_of_the_bradley_terry_loss(fitted):
    differences, _, expected, hessian = fitted
    np.testing.assert_allclose(hessian.numpy(), expected, rtol=1e-5, atol=1e-6)
    w = torch.zeros(D, dtype=torch.float64)
    x = torch.from_numpy(differences).double()
    automatic = torch.autograd.functional.hessian(lambda w: torch.nn.functional.softplus(-(x @ w)).sum(), w)
    at_zero = torch.zeros(D, D)
    add_to_hessian(at_zero, torch.from_numpy(differences), torch.zeros(len(differences)))
    np.testing.assert_allclose(at_zero.numpy(), automatic.numpy(), rtol=1e-5, atol=1e-6)


def test_variances_and_deviations_are_quadratic_forms_of_the_inverse(fitted):
    differences, spectrum, hessian, _ = fitted
    temperature, mean = 1.7, np.linspace(-1, 1, D)
    candidates = spectrum.candidates().numpy()
    np.testing.assert_allclose(candidates / (np.trace(hessian) / D), np.logspace(-4, 4, 17), rtol=1e-4)
    variances = spectrum.logit_variances(torch.from_numpy(differences)).numpy()
    for k, prior in enumerate(candidates):
        inverse = np.linalg.inv(hessian + prior * np.eye(D))
        expected = [difference @ inverse @ difference for difference in differences]
        np.testing.assert_allclose(variances[:, k], expected, rtol=1e-4)
    posterior = spectrum.posterior(torch.from_numpy(mean), temperature, float(candidates[8]))
    states = torch.randn(7, D)
    covariance = temperature**2 * np.linalg.inv(hessian + candidates[8] * np.eye(D))
    expected = [math.sqrt((state - mean) @ covariance @ (state - mean)) for state in states.numpy()]
    np.testing.assert_allclose(posterior.stds(states).numpy(), expected, rtol=1e-4)
    between = (posterior.project(states)[0] - posterior.project(states)[1]).norm()
    difference = (states[0] - states[1]).numpy()
    assert float(between) == pytest.approx(math.sqrt(difference @ covariance @ difference), rel=1e-4)


def test_a_win_is_as_likely_as_the_mean_sigmoid_of_a_gaussian():
    draws = torch.randn(400_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for margin, std, temperature in ((1.5, 2.0, 1.0), (-0.7, 0.5, 2.0), (4.0, 5.0, 1.5), (1.0, 0.0, 2.0)):
        sampled = torch.sigmoid((margin + std * draws) / temperature).mean()
        logit = win_logits(torch.tensor([margin]), torch.tensor([std]), temperature)
        assert float(torch.sigmoid(logit)) == pytest.approx(float(sampled), abs=0.02)  # MacKay's approximation


def test_lambda_is_the_most_likely_and_the_largest_of_equals():
    candidates = torch.tensor([0.1, 1.0, 10.0])
    variances = torch.tensor([[9.0, 1.0, 1.0], [0.0, 4.0, 4.0]], dtype=torch.float64)
    margins = torch.tensor([3.0, -1.0])
    best, temperature, losses = choose_prior_precision(candidates, margins, variances, lambda _: 1.0)
    assert temperature == 1.0
    expected = [
        np.mean([np.logaddexp(0, -m / math.sqrt(1 + math.pi / 8 * v)) for m, v in zip((3, -1), column, strict=True)])
        for column in variances.T.tolist()
    ]
    np.testing.assert_allclose(losses.numpy(), expected)
    assert best == (pytest.approx(10.0) if expected[1] < expected[0] else pytest.approx(0.1))


def test_states_far_from_the_data_are_uncertain_and_the_posterior_covers_the_true_head():
    rng = np.random.default_rng(1)
    inside = []
    for _ in range(40):
        true = rng.normal(size=D)
        x = rng.normal(size=(300, D)) * np.array([1, 1, 1, 1, 0.02])  # one direction is hardly seen
        wins = rng.random(300) < 1 / (1 + np.exp(-(x @ true)))
        x = np.where(wins[:, None], x, -x)
        w = np.zeros(D)
        for _ in range(15):  # Newton's method for the most likely head under a prior of precision 1
            p = 1 / (1 + np.exp(-(x @ w)))
            w += np.linalg.solve((x.T * (p * (1 - p))) @ x + np.eye(D), x.T @ (1 - p) - w)
        hessian = torch.zeros(D, D)
        add_to_hessian(hessian, torch.from_numpy(x), torch.from_numpy(x @ w))
        posterior = Spectrum.of(hessian).posterior(torch.zeros(D), 1.0, 1.0)
        state = torch.from_numpy(rng.normal(size=(1, D)))
        error = float((state.numpy() @ (w - true))[0])
        inside.append(abs(error) < 2 * float(posterior.stds(state)))
        seen, unseen = posterior.stds(torch.eye(D)[[0, 4]])
        assert unseen > 2 * seen
    assert np.mean(inside) > 0.85


def test_it_moves_without_change():
    posterior = HeadPosterior(torch.eye(D), torch.zeros(D), 1.0, 2.0).to("cpu")
    assert posterior.prior_precision == 2.0
