"""Processes give the results of a loop, in order; an error or a lost process reaches the caller."""

import os

import pytest

from rlhf_critic.data.processes import map_in_processes
from rlhf_critic.errors import UnexpectedError


def scale(factor: int, number: int) -> tuple[int, int]:
    print("what a function prints does not mix with its answers")
    return os.getpid(), factor * 10 // number


def die(_: None, number: int) -> None:
    os._exit(number)


def test_results_are_in_order_and_come_from_several_processes():
    items = [1, 2, 5, 10] * 5
    found = list(map_in_processes(scale, 2, items, 2))
    assert [result for _, result in found] == [20 // item for item in items]
    workers = {process for process, _ in found}
    assert len(workers) == 2
    assert os.getpid() not in workers
    with pytest.raises(ProcessLookupError):  # none is left
        os.kill(workers.pop(), 0)


def test_one_item_or_one_process_needs_no_other():
    assert list(map_in_processes(scale, 2, [5], 8)) == [(os.getpid(), 4)]
    assert list(map_in_processes(scale, 2, [5, 4], 1)) == [(os.getpid(), 4), (os.getpid(), 5)]


def test_the_first_error_is_raised_and_so_is_a_lost_process():
    results = map_in_processes(scale, 2, [1, 0, 2], 2)
    assert next(results)[1] == 20
    with pytest.raises(ZeroDivisionError):
        next(results)
    with pytest.raises(UnexpectedError, match="ended with exit code 3"):
        list(map_in_processes(die, None, [3, 3], 2))
