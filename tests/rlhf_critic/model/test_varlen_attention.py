"""Attention by varlen kernels equals dense attention under the mask of the tree, in both plans and all kernels.

The operators are emulated, see `varlen_emulation.py`: no GPU is needed. The same tests hold for random trees of several
shapes, grouped heads, windows, soft caps, all tokens or leaves only, and gradients.
"""

import math

import numpy as np
import pytest
import torch

from rlhf_critic.batching.prefix_tree import PrefixTree
from rlhf_critic.batching.varlen_plan import level_calls, path_calls, plan_calls
from rlhf_critic.model.varlen_attention import varlen_attention
from rlhf_critic.model.varlen_kernels import EfficientAttention, FlashAttention, FlashAttentionPackage, Scores
from tests.rlhf_critic.model.varlen_emulation import emulated_operators

TREES = ["branches", "pairs", "samples", "turns", "alone"]
PLANS = {"paths": path_calls, "levels": level_calls}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


@pytest.fixture(autouse=True, scope="module")
def _emulation():
    with emulated_operators():
        yield


def random_tree(rng: np.random.Generator, kind: str) -> PrefixTree:
    def draw(most: int, letters: int = 50) -> np.ndarray:
        return rng.integers(0, letters, rng.integers(1, most))

    if kind == "branches":  # two letters: duplicates, sequences that begin others, branches everywhere
        return PrefixTree.build([draw(12, 2) for _ in range(rng.integers(1, 14))])
    if kind == "pairs":
        prompts = [draw(20) for _ in range(rng.integers(1, 6))]
        return PrefixTree.build([np.append(prompt, draw(15)) for prompt in prompts for _ in range(2)])
    if kind == "samples":  # one prompt; few first letters, so that a run has several branching tokens
        prompt = draw(20)
        return PrefixTree.build([np.append(prompt, draw(9, 3)) for _ in range(rng.integers(2, 24))])
    if kind == "turns":  # deep
        history, sequences = draw(6), []
        for _ in range(rng.integers(2, 7)):
            sequences += [np.append(history, draw(6)), np.append(history, draw(6))]
            history = sequences[-1]
        return PrefixTree.build(sequences)
    return PrefixTree.build([np.append(1000 + row, draw(9)) for row in range(rng.integers(1, 5))])


def dense(query, key, value, tree, for_leaves, scores: Scores) -> torch.Tensor:
    """Softmax over the path of each token, by definition."""
    visible_TT = torch.zeros(len(tree), len(tree), dtype=torch.bool)
    for token in range(len(tree)):
        path = tree.path_tokens(token)
        visible_TT[token, path[-scores.window :] if scores.window else path] = True
    visible_QT = visible_TT[tree.run_ends_R - 1] if for_leaves else visible_TT
    group = query.shape[1] // key.shape[1]
    products = query @ key.repeat_interleave(group, 1).transpose(2, 3) * scores.scale
    if scores.softcap:
        products = scores.softcap * torch.tanh(products / scores.softcap)
    weights = products.masked_fill(~visible_QT, -math.inf).softmax(-1)
    return (weights @ value.repeat_interleave(group, 1)).transpose(1, 2)


def differences(tree, plan, kernel, scores, for_leaves, dtype, heads=(4, 2), size=8, seed=0) -> list[float]:
    """Largest differences of output and gradients from dense attention in fp64, relative to the largest entry."""
    generator = torch.Generator().manual_seed(seed)
    queries = len(tree.run_starts_R) if for_leaves else len(tree)
    shapes = [(1, heads[0], queries, size), (1, heads[1], len(tree), size), (1, heads[1], len(tree), size)]
    # Token-major in memory, as projections write them.
    drawn = [
        torch.randn(1, rows, number, size, generator=generator, dtype=torch.float64).transpose(1, 2).to(dtype)
        for _, number, rows, _ in shapes
    ]
    calls = plan(tree)
    mine = [tensor.detach().requires_grad_() for tensor in drawn]
    output = varlen_attention(*mine, calls.leaves if for_leaves else calls.every, kernel, scores)
    gradient = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(dtype)
    output.backward(gradient)
    exact = [tensor.double().requires_grad_() for tensor in drawn]
    expected = dense(*exact, tree, for_leaves, scores)
    expected.backward(gradient.double())
    assert output.shape == expected.shape
    assert output.dtype == dtype
    pairs = [(output, expected), *((one.grad, other.grad) for one, other in zip(mine, exact, strict=True))]
    return [
        float((one - other).detach().abs().max() / other.detach().abs().max().clamp(min=1.0)) for one, other in pairs
    ]


@pytest.mark.parametrize("for_leaves", [False, True], ids=["every token", "leaves"])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("kind", TREES)
def test_both_plans_compute_dense_attention(kind, plan, for_leaves):
    rng = np.random.default_rng([TREES.index(kind), for_leaves])
    for seed in range(3):
        tree = random_tree(rng, kind)
        for dtype, limit in TOLERANCE.items():
            found = differences(tree, PLANS[plan], FlashAttention(), Scores(0.3), for_leaves, dtype, seed=seed)
            assert max(found) < limit, (dtype, found)


@pytest.mark.parametrize("for_leaves", [False, True], ids=["every token", "leaves"])
@pytest.mark.parametrize(
    ("kernel", "plan", "scores"),
    [
        (FlashAttention(), "paths", Scores(0.3, window=3)),
        (FlashAttention(), "paths", Scores(0.3, window=1)),
        (EfficientAttention(), "paths", Scores(0.3)),
        (FlashAttentionPackage(), "paths", Scores(0.3, softcap=2.0)),
        (FlashAttentionPackage(), "paths", Scores(0.3, window=3, softcap=2.0)),
        (FlashAttentionPackage(), "levels", Scores(0.3, softcap=2.0)),
    ],
    ids=["window", "own key", "efficient", "soft cap", "soft cap and window", "soft cap by levels"],
)
def test_every_kernel_computes_dense_attention(kernel, plan, scores, for_leaves):
    rng = np.random.default_rng(7)
    for kind in TREES:
        tree = random_tree(rng, kind)
        for dtype, limit in TOLERANCE.items():
            found = differences(tree, PLANS[plan], kernel, scores, for_leaves, dtype)
            assert max(found) < limit, (kind, dtype, found)


@pytest.mark.parametrize(("heads", "size"), [((4, 4), 8), ((6, 1), 16), ((3, 3), 5)], ids=["plain", "one", "padded"])
@pytest.mark.parametrize("plan", PLANS)
def test_head_layouts(plan, heads, size):
    tree = random_tree(np.random.default_rng(3), "samples")
    found = differences(tree, PLANS[plan], FlashAttention(), Scores(0.3), False, torch.float64, heads, size)
    assert max(found) < 1e-12


@pytest.mark.parametrize("for_leaves", [False, True], ids=["every token", "leaves"])
@pytest.mark.parametrize("plan", PLANS)
def test_cached_tokens_are_keys_only(plan, for_leaves):
    """Keys and values of cached tokens stand behind those of the computed tokens, which alone are queries."""
    rng = np.random.default_rng(11)
    for _ in range(6):
        prompts = [rng.integers(0, 3, rng.integers(1, 9)) for _ in range(3)]
        sequences = [np.append(prompt, rng.integers(0, 3, rng.integers(1, 6))) for prompt in prompts for _ in range(3)]
        cached_S = [int(rng.integers(0, len(prompt) + 1)) for prompt in prompts for _ in range(3)]
        tree = PrefixTree.build(sequences, cached_S)
        computed_T = np.flatnonzero(~tree.is_cached_R[tree.run_of_T])
        generator = torch.Generator().manual_seed(0)
        query, key, value = (
            torch.randn(1, heads, len(tree), 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2)
        )
        expected = dense(query, key, value, tree, False, Scores(0.3))[:, computed_T]
        placed = np.argsort(tree.places_T)
        asked = tree.run_ends_R[tree.computed_runs] - 1 if for_leaves else computed_T
        calls = PLANS[plan](tree)
        with torch.no_grad():
            output = varlen_attention(
                query[:, :, asked],
                key[:, :, placed],
                value[:, :, placed],
                calls.leaves if for_leaves else calls.every,
                FlashAttention(),
                Scores(0.3),
            )
        expected = expected[:, tree.places_T[asked]]
        torch.testing.assert_close(output, expected, rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("plan", PLANS)
def test_bf16_rounds_once(plan):
    """Outputs are joined and gradients are added in fp32, so errors stay those of one rounding of each input."""
    tree = random_tree(np.random.default_rng(5), "turns")
    found = differences(tree, PLANS[plan], FlashAttention(), Scores(0.3), False, torch.bfloat16)
    assert max(found) < 2**-7


def test_the_cheaper_plan_is_taken():
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, 9000, 400)
    pair = PrefixTree.build([np.append(prompt, rng.integers(0, 9000, 100)) for _ in range(2)])
    samples = PrefixTree.build([np.append(prompt, rng.integers(0, 9000, 20)) for _ in range(64)])
    assert len(plan_calls(pair).every) == 1
    assert len(plan_calls(samples).every) == 2
    assert len(plan_calls(samples, paths_only=True).every) == 1


def test_sequences_that_share_nothing_copy_no_key():
    tree = random_tree(np.random.default_rng(0), "alone")
    for plan in PLANS.values():
        (call,) = plan(tree).every
        assert call.keys_N is None
        assert call.queries_Q is None


def test_queries_without_keys_are_zero_in_the_emulation():
    """As in the kernels. No plan has such queries, so only this test sees them."""
    query, key = torch.randn(3, 2, 8), torch.randn(2, 2, 8)
    starts = [torch.tensor(edges, dtype=torch.int32) for edges in ([0, 2, 3], [0, 2, 2])]
    output, lse, *_ = torch.ops.aten._flash_attention_forward(
        *(query, key, key, *starts, 2, 2, 0.0, True, False), scale=1.0, window_size_left=-1, window_size_right=-1
    )
    assert (output[2] == 0).all()
    assert (lse[:, 2] == math.inf).all()
    assert torch.isfinite(output).all()
