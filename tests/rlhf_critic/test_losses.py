"""The loss equals its definition, in fp32, also where the naive formula overflows."""

import math

import pytest
import torch

from rlhf_critic.losses import bradley_terry_loss


def test_equals_the_definition():
    chosen, rejected = torch.tensor([1.0, -2.0, 0.3]), torch.tensor([0.5, 1.0, 0.3])
    expected = [
        -math.log(1 / (1 + math.exp(-(c - r)))) for c, r in zip(chosen.tolist(), rejected.tolist(), strict=True)
    ]
    assert bradley_terry_loss(chosen, rejected).tolist() == pytest.approx(expected, rel=1e-6)


def test_stays_finite_and_fp32():
    loss = bradley_terry_loss(torch.tensor([-500.0], dtype=torch.bfloat16), torch.tensor([500.0], dtype=torch.bfloat16))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(1000.0)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"\(2,\), \(3,\)"):
        bradley_terry_loss(torch.zeros(2), torch.zeros(3))
