"""A replica whose swap fails tries again by itself, and serves the previous critic meanwhile."""

import asyncio
import threading

import pytest

from actors.serving import swap
from actors.serving.swap import Swap

OLD, NEW, NEWEST = {"critic": "old"}, {"critic": "new"}, {"critic": "newest"}


class Loader:
    """Loads a configuration, and fails as often as it is told to."""

    def __init__(self, failures=0):
        self.failures, self.loaded, self.reports = failures, [], []

    def __call__(self, config):
        self.loaded.append(config)
        if self.failures:
            self.failures -= 1
            raise OSError("NFS: stale file handle")


async def until(condition, swapping):
    """Calls `Swap.proceed` as Serve's health checks do, until a condition holds."""
    for _ in range(500):
        if condition():
            return
        swapping.proceed()
        await asyncio.sleep(0.01)
    raise AssertionError(f"not within 5 s: {vars(swapping)}")


def run(loader, use, monkeypatch):
    monkeypatch.setattr(swap, "FIRST_WAIT_S", 0.02)

    async def main():
        swapping = Swap(OLD, loader, lambda: loader.reports.append((swapping.serving, swapping.error)))
        await use(swapping)

    asyncio.run(main())


@pytest.mark.parametrize("failures", [0, 1, 3])
def test_a_swap_that_failed_is_tried_again_until_it_works(failures, monkeypatch):
    loader = Loader(failures)

    async def use(swapping):
        swapping.want(NEW)
        await until(lambda: swapping.is_current, swapping)
        await asyncio.sleep(0)
        assert (swapping.serving, swapping.error, swapping.failures) == (NEW, "", 0)

    run(loader, use, monkeypatch)
    assert loader.loaded == [NEW] * (failures + 1)
    assert loader.reports == [(OLD, "NFS: stale file handle")] * failures + [(NEW, loader.reports[-1][1])]


def test_attempts_are_not_made_at_every_health_check(monkeypatch):
    loader = Loader(failures=100)

    async def use(swapping):
        swapping.want(NEW)
        await until(lambda: swapping.failures == 4, swapping)
        monkeypatch.setattr(swap, "FIRST_WAIT_S", 30.0)
        await until(lambda: swapping.failures == 5, swapping)
        for _ in range(50):
            swapping.proceed()
            await asyncio.sleep(0.005)
        assert swapping.failures == 5
        assert swapping.serving == OLD

    run(loader, use, monkeypatch)


def test_waiting_times_leave_no_pool_mixed_for_more_than_a_minute():
    waits = [min(swap.MAX_WAIT_S, swap.FIRST_WAIT_S * 2**failures) for failures in range(20)]
    assert waits == sorted(waits)
    assert max(waits) <= 30


def test_a_new_configuration_is_loaded_at_once_and_has_no_error_of_its_predecessor(monkeypatch):
    loader = Loader(failures=1)
    monkeypatch.setattr(swap, "MAX_WAIT_S", 600.0)

    async def use(swapping):
        monkeypatch.setattr(swap, "FIRST_WAIT_S", 600.0)
        swapping.want(NEW)
        await until(lambda: swapping.error, swapping)
        swapping.want(NEWEST)
        assert (swapping.error, swapping.failures) == ("", 0)
        await until(lambda: swapping.is_current, swapping)
        assert swapping.serving == NEWEST

    run(loader, use, monkeypatch)


def test_a_configuration_that_comes_during_an_attempt_is_served_in_the_end(monkeypatch):
    started, go_on = threading.Event(), threading.Event()
    loader = Loader()

    def load(config):
        started.set()
        assert go_on.wait(5)
        loader(config)

    load.reports = loader.reports

    async def use(swapping):
        swapping.want(NEW)
        assert await asyncio.to_thread(started.wait, 5)
        swapping.want(NEWEST)
        go_on.set()
        await until(lambda: swapping.is_current, swapping)

    run(load, use, monkeypatch)
    assert loader.loaded == [NEW, NEWEST]
