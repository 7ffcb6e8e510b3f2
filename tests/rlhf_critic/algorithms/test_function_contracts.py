"""Every function of PPO computes in fp32, leaves its arguments as they are, and refuses shapes that differ."""

import numpy as np
import pytest
import torch

from rlhf_critic.algorithms.gae import Turns, decoupled_gae, gae, group_advantages, length_adaptive_lambda
from rlhf_critic.algorithms.ppo import clip_rewards, estimate_kl, masked_mean, shaped_rewards, whiten
from rlhf_critic.algorithms.ppo_losses import clipped_policy_loss, clipped_value_loss
from rlhf_critic.algorithms.value_metrics import explained_variance

MASK = torch.tensor([[True, True, False], [True, False, True]])
ROW, TOKENS = torch.tensor([True, False]), torch.ones(2, 3)
CALLS = {
    "estimate_kl": (lambda a, b: estimate_kl(a, b, "k3"), (TOKENS, TOKENS)),
    "shaped_rewards": (lambda r, kl, m: shaped_rewards(r, kl, m, 0.1), (torch.ones(2), TOKENS, MASK)),
    "clip_rewards": (lambda r: clip_rewards(r, 0.5), (torch.ones(2),)),
    "gae": (lambda r, v, m, last, cut: gae(r, v, m, last, cut, 0.9, 0.9), (TOKENS, TOKENS, MASK, torch.ones(2), ROW)),
    "gae with a lambda of each rollout": (
        lambda r, v, m, last, cut, lambdas: gae(r, v, m, last, cut, 0.9, lambdas),
        (TOKENS, TOKENS, MASK, torch.ones(2), ROW, torch.ones(2)),
    ),
    "decoupled_gae": (
        lambda r, v, m, last, cut: decoupled_gae(r, v, m, last, cut, 0.9, 0.8, 0.9),
        (TOKENS, TOKENS, MASK, torch.ones(2), ROW),
    ),
    "length_adaptive_lambda": (lambda m: length_adaptive_lambda(m, 0.5), (MASK,)),
    "Turns.of": (lambda r, v, m: Turns.of(r, v, m).rewards_SK, (TOKENS, TOKENS, MASK)),
    "group_advantages": (lambda r: group_advantages(r, np.array([0, 0]), "grpo"), (torch.ones(2),)),
    "masked_mean": (masked_mean, (TOKENS, MASK)),
    "whiten": (whiten, (TOKENS, MASK)),
    "explained_variance": (explained_variance, (TOKENS, TOKENS, MASK)),
    "clipped_value_loss": (lambda v, old, r: clipped_value_loss(v, old, r, 0.2), (TOKENS, TOKENS, TOKENS)),
    "clipped_policy_loss": (lambda p, old, a: clipped_policy_loss(p, old, a, 0.2), (TOKENS, TOKENS, TOKENS)),
}


def random_arguments(templates):
    return [template if template.dtype == torch.bool else torch.randn(template.shape) for template in templates]


def results(call, arguments):
    result = call(*arguments)
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", CALLS)
def test_any_input_is_computed_in_fp32(name, dtype):
    torch.manual_seed(0)
    call, templates = CALLS[name]
    given = [x if x.dtype == torch.bool else x.to(dtype) for x in random_arguments(templates)]
    cast = [x if x.dtype == torch.bool else x.float() for x in given]
    for actual, expected in zip(results(call, given), results(call, cast), strict=True):
        assert actual.dtype in (torch.float32, torch.bool)
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", CALLS)
def test_arguments_stay_as_they_are(name):
    torch.manual_seed(0)
    call, templates = CALLS[name]
    arguments = random_arguments(templates)
    before = [x.clone() for x in arguments]
    for result in results(call, arguments):
        result.zero_()  # the result shares no memory with them
    assert all(torch.equal(x, y) for x, y in zip(arguments, before, strict=True))


@pytest.mark.parametrize(
    ("name", "place"),
    [(name, place) for name, (_, templates) in CALLS.items() for place in range(len(templates)) if len(templates) > 1],
)
def test_shapes_that_differ_are_refused_with_both(name, place):
    call, templates = CALLS[name]
    arguments = list(templates)
    # One row would broadcast and give wrong numbers.
    arguments[place] = arguments[place][:1]
    # The message contains both shapes, or both numbers of rows if a row has one number.
    with pytest.raises(ValueError, match=r"differ in shape: (\(1,.*\), \(2,.*\)|\(2,.*\), \(1,.*\))"):
        call(*arguments)
