"""Positions of response tokens equal those found by hand, and errors name inconsistent rollouts by number."""

import math

import numpy as np
import pytest

from rlhf_critic.algorithms.response_tokens import ResponseTokens, nonempty_responses, validate_rollouts

# Two response tokens, none, one after a prompt of one token, three.
SEQUENCES = [[5, 6, 7, 8], [9, 10], [11, 12], [13, 14, 15, 16, 17]]
PROMPT_LENGTHS = [2, 2, 1, 2]


def test_an_action_draws_the_token_after_the_one_it_has_read():
    actions = ResponseTokens.of(SEQUENCES, PROMPT_LENGTHS)
    assert actions.rows_A.tolist() == [0, 0, 2, 3, 3, 3]
    assert actions.columns_A.tolist() == [1, 2, 0, 1, 2, 3]
    assert actions.drawn_A.tolist() == [7, 8, 12, 15, 16, 17]
    assert actions.places == (actions.rows_A, actions.columns_A)


def test_no_action_reads_the_last_token_of_its_rollout():
    actions = ResponseTokens.of(SEQUENCES, PROMPT_LENGTHS)
    shortened = [ids[:-1] for ids in SEQUENCES]
    assert all(column < len(shortened[row]) for row, column in zip(*actions.places, strict=True))


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint16])
def test_arrays_of_any_integers_give_int64(dtype):
    actions = ResponseTokens.of([np.array(ids, dtype=dtype) for ids in SEQUENCES], PROMPT_LENGTHS)
    assert actions.drawn_A.tolist() == [7, 8, 12, 15, 16, 17]
    assert {column.dtype for column in (actions.rows_A, actions.columns_A, actions.drawn_A)} == {np.dtype(np.int64)}


def test_empty_responses_have_no_action():
    actions = ResponseTokens.of([[1, 2], [3]], [2, 1])
    for column in (actions.rows_A, actions.columns_A, actions.drawn_A):
        assert column.shape == (0,)
        assert column.dtype == np.int64
    assert nonempty_responses([[1, 2], [3]], [2, 1]) == []
    assert nonempty_responses(SEQUENCES, PROMPT_LENGTHS) == [0, 2, 3]


def numbers() -> list[np.ndarray]:
    """Makes one number per response token of `SEQUENCES`."""
    return [np.array([0.5, 1.0]), np.array([]), np.array([2.0]), np.array([0.0, -1.0, 3.0])]


def test_rollouts_that_fit_pass():
    validate_rollouts(SEQUENCES, PROMPT_LENGTHS)
    validate_rollouts(
        SEQUENCES, PROMPT_LENGTHS, returns=numbers(), old_values=[row.astype(np.float32) for row in numbers()]
    )
    validate_rollouts([], [], returns=[])


@pytest.mark.parametrize(
    ("prompt_lengths", "message"),
    [
        ([2, 2, 0, 2], "rollout 2: a prompt of 0 tokens in a sequence of 2"),
        ([2, 2, 1, -1], "rollout 3: a prompt of -1 tokens in a sequence of 5"),
        ([2, 3, 1, 2], "rollout 1: a prompt of 3 tokens in a sequence of 2"),
        ([2, 2, 1], "4 rollouts, but prompt_lengths has 3 entries"),
        ([2, 2, 1, 2, 1], "4 rollouts, but prompt_lengths has 5 entries"),
    ],
)
def test_prompts_that_do_not_fit_are_named(prompt_lengths, message):
    with pytest.raises(ValueError, match=message):
        validate_rollouts(SEQUENCES, prompt_lengths)


def test_an_empty_sequence_is_named():
    with pytest.raises(ValueError, match="rollout 1: a prompt of 1 tokens in a sequence of 0"):
        validate_rollouts([[1], []], [1, 1])


@pytest.mark.parametrize(
    ("rollout", "row", "message"),
    [
        (0, np.zeros(3), r"rollout 0: returns has the shape \(3,\), but the response has 2 tokens"),
        (3, np.zeros(2), r"rollout 3: returns has the shape \(2,\), but the response has 3 tokens"),
        (1, np.zeros(1), r"rollout 1: returns has the shape \(1,\), but the response has 0 tokens"),
        (3, np.zeros((3, 1)), r"rollout 3: returns has the shape \(3, 1\)"),
        (2, np.float64(1.0), r"rollout 2: returns has the shape \(\)"),
        (3, np.array([1.0, math.nan, math.inf]), "rollout 3: returns is nan at action 1"),
        (0, np.array([1.0, -math.inf]), "rollout 0: returns is -inf at action 1"),
        (2, np.array([math.inf]), "rollout 2: returns is inf at action 0"),
    ],
)
def test_numbers_that_do_not_fit_are_named_by_rollout_and_action(rollout, row, message):
    rows = numbers()
    rows[rollout] = row
    with pytest.raises(ValueError, match=message):
        validate_rollouts(SEQUENCES, PROMPT_LENGTHS, old_values=numbers(), returns=rows)


@pytest.mark.parametrize("count", [3, 5])
def test_too_few_or_too_many_rows_of_numbers_are_named(count):
    rows = [*numbers(), np.zeros(1)][:count]
    with pytest.raises(ValueError, match=f"4 rollouts, but old_values has {count} entries"):
        validate_rollouts(SEQUENCES, PROMPT_LENGTHS, returns=numbers(), old_values=rows)
