"""Losses of PPO equal a slow computation from their definitions, token by token, with their gradients."""

import math

import pytest
import torch

from rlhf_critic.algorithms.ppo_losses import clipped_policy_loss, clipped_value_loss, token_weights
from tests.rlhf_critic.algorithms.definitions import close


def slow_value_loss(value, old_value, target, clip):
    """Computes the loss of one token from float64 scalars with gradients, and whether the clipped term counts."""
    square = (value - target) ** 2
    if clip is None:
        return square / 2, False
    near = min(max(value, old_value - clip), old_value + clip)
    near_square = (near - target) ** 2
    return max(square, near_square) / 2, bool(near_square > square)


def slow_policy_loss(log_prob, old_log_prob, advantage, clip):
    ratio = torch.exp(log_prob - old_log_prob)
    near = min(max(ratio, torch.tensor(1.0 - clip)), torch.tensor(1.0 + clip))
    return max(-advantage * ratio, -advantage * near), bool(-advantage * near > -advantage * ratio)


@pytest.mark.parametrize("shape", [(40,), (6, 9), (2, 3, 4), (), (3, 0)])
@pytest.mark.parametrize(
    ("loss_of", "slow_loss_of", "clip"),
    [
        (clipped_value_loss, slow_value_loss, 0.2),
        (clipped_value_loss, slow_value_loss, None),
        (clipped_policy_loss, slow_policy_loss, 0.2),
    ],
)
def test_clipped_losses_and_their_gradients_equal_a_loop_over_tokens(loss_of, slow_loss_of, clip, shape):
    torch.manual_seed(0)
    old = -torch.rand(shape)
    new = (old + 0.4 * torch.randn(shape)).requires_grad_()
    target = torch.randn(shape)
    loss, clipped = loss_of(new, old, target, clip)
    exact = new.detach().double().requires_grad_()
    triples = zip(exact.flatten(), old.double().flatten(), target.double().flatten(), strict=True)
    expected = [slow_loss_of(*triple, clip) for triple in triples]
    assert loss.shape == clipped.shape == shape
    close(loss.detach().flatten(), [one.item() for one, _ in expected])
    assert clipped.dtype == torch.bool
    assert clipped.flatten().tolist() == [was_clipped for _, was_clipped in expected]
    if not expected:
        return
    if clip is not None and loss.numel() > 1:
        assert clipped.any(), "the example does not clip"
        assert not clipped.all(), "the example only clips"
    loss.sum().backward()
    sum(one for one, _ in expected).backward()
    close(new.grad, exact.grad)
    assert not new.grad[clipped].any()


def test_clipped_losses_of_examples_worked_by_hand():
    # The value moved from 0 to 1 and may move by 0.5. Towards the return 3 it is held at 0.5: (0.5 - 3)^2 / 2 = 3.125.
    # Away from the return -3 the full distance counts: (1 + 3)^2 / 2 = 8.
    values, old_values, returns = torch.ones(2), torch.zeros(2), torch.tensor([3.0, -3.0])
    loss, clipped = clipped_value_loss(values, old_values, returns, 0.5)
    close(loss, [3.125, 8.0])
    assert clipped.tolist() == [True, False]
    loss, clipped = clipped_value_loss(values, old_values, returns, None)
    close(loss, [2.0, 8.0])
    assert clipped.tolist() == [False, False]
    # The ratio is 2 or 1/2 and may be 0.8 to 1.2; the advantage is 3 or -3.
    log_probs = torch.tensor([math.log(2), math.log(2), -math.log(2), -math.log(2)])
    loss, clipped = clipped_policy_loss(log_probs, torch.zeros(4), torch.tensor([3.0, -3.0, 3.0, -3.0]), 0.2)
    close(loss, [-3.6, 6.0, -1.5, 2.4])
    assert clipped.tolist() == [True, False, False, True]


def test_the_first_step_on_new_rollouts_is_the_plain_gradient():
    # Both terms are equal there, and no part of the gradient may disappear.
    log_probs = torch.tensor([-0.3, -1.7, -2.0], requires_grad=True)
    advantages = torch.tensor([2.0, -1.0, 0.0])
    loss, clipped = clipped_policy_loss(log_probs, log_probs.detach(), advantages, 0.2)
    loss.sum().backward()
    close(log_probs.grad, -advantages)
    values = torch.tensor([1000.1, -0.3], requires_grad=True)
    loss, values_clipped = clipped_value_loss(values, values.detach(), torch.tensor([999.0, 1.0]), 0.2)
    loss.sum().backward()
    close(values.grad, values.detach() - torch.tensor([999.0, 1.0]))
    assert not clipped.any()
    assert not values_clipped.any()


def test_rounding_does_not_count_as_clipping():
    # Within the range, although old + (new - old) differs from new in fp32.
    values, old_values = 0.1 + torch.rand(1000), 1000.0 + torch.rand(1000)
    _, clipped = clipped_value_loss(values, old_values, torch.zeros(1000), 2000.0)
    assert not clipped.any()


def test_a_clipped_ratio_that_overflows_has_no_gradient():
    log_probs = torch.tensor([0.0, 0.0, -1000.0], requires_grad=True)
    old_log_probs = torch.tensor([-1000.0, -1000.0, 0.0])
    loss, clipped = clipped_policy_loss(log_probs, old_log_probs, torch.tensor([1.0, 0.0, -1.0]), 0.2)
    close(loss.detach(), [-1.2, 0.0, 0.8])
    assert clipped.tolist() == [True, False, True], "without an advantage there is nothing to clip"
    loss.sum().backward()
    assert log_probs.grad.tolist() == [0.0, 0.0, 0.0]


def test_clips_that_mean_nothing_are_refused():
    x = torch.zeros(1)
    for clip in (0.0, -0.2, math.nan):
        with pytest.raises(ValueError, match="clip"):
            clipped_value_loss(x, x, x, clip)
    for clip in (0.0, -0.2, 1.0, math.nan):
        with pytest.raises(ValueError, match="clip"):
            clipped_policy_loss(x, x, x, clip)


@pytest.mark.parametrize("clip_high", [None, 0.28, 1.5])
@pytest.mark.parametrize("dual_clip", [None, 1.3, 3.0])
def test_other_limits_of_the_ratio_equal_a_loop_over_tokens(clip_high, dual_clip):
    torch.manual_seed(0)
    old = -torch.rand(400)
    new = (old + torch.randn(400)).requires_grad_()
    advantages = torch.randn(400)
    loss, clipped = clipped_policy_loss(new, old, advantages, 0.2, clip_high, dual_clip)
    exact = new.detach().double().requires_grad_()
    total, expected, limited = 0.0, [], []
    for log_prob, old_log_prob, advantage in zip(exact, old.double(), advantages.double(), strict=True):
        ratio = torch.exp(log_prob - old_log_prob)
        near = min(max(ratio, torch.tensor(0.8)), torch.tensor(1.0 + (0.2 if clip_high is None else clip_high)))
        one = max(-advantage * ratio, -advantage * near)
        is_limited = bool(-advantage * near > -advantage * ratio)
        if dual_clip is not None and advantage < 0 and one > -advantage * dual_clip:
            one, is_limited = -advantage * dual_clip, True
        total = total + one
        expected.append(one.item())
        limited.append(is_limited)
    close(loss.detach(), expected)
    assert clipped.tolist() == limited
    loss.sum().backward()
    total.backward()
    close(new.grad, exact.grad)


def test_other_limits_of_examples_worked_by_hand():
    # Ratios 2, 2 and 5 with advantages 3, -3 and -3: the rise may be 50%, and a negative advantage counts 4 times.
    log_probs = torch.tensor([math.log(2), math.log(2), math.log(5)])
    loss, clipped = clipped_policy_loss(log_probs, torch.zeros(3), torch.tensor([3.0, -3.0, -3.0]), 0.2, 0.5, 4.0)
    close(loss, [-4.5, 6.0, 12.0])
    assert clipped.tolist() == [True, False, True]
    x = torch.zeros(1)
    for clip_high in (0.0, -0.1, math.nan):
        with pytest.raises(ValueError, match="upper clip"):
            clipped_policy_loss(x, x, x, 0.2, clip_high)
    for dual_clip in (1.0, 0.5, math.nan):
        with pytest.raises(ValueError, match="dual clip"):
            clipped_policy_loss(x, x, x, 0.2, None, dual_clip)


def test_weights_of_tokens_make_the_mean_over_sequences():
    counts = [1, 4, 7]
    losses = [[float(10 * row + token) for token in range(count)] for row, count in enumerate(counts)]
    weights = token_weights(counts, "sequence")
    weighted = sum(weight * sum(row) for weight, row in zip(weights, losses, strict=True)) / sum(counts)
    assert weighted == pytest.approx(sum(sum(row) / len(row) for row in losses) / len(losses))
    assert token_weights(counts, "token") is None
    with pytest.raises(ValueError, match="'group'"):
        token_weights(counts, "group")
