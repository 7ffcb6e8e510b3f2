"""Ranks are called together: in one order, with one answer, and none waits forever when another is lost.

Knows nothing about critics; the ranks here are real actors in a real process group.
"""

import os
import pickle
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import ray
import torch
import torch.distributed as dist
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.runtime import rank_group
from actors.runtime.rank_group import Rank, RankGroup
from rlhf_critic.errors import CheckpointError, NonFiniteLossError, PlacementError, RankLost
from tests.actors.groups import CPUS, leaves_nothing, processes, require_gone
from tests.helpers import slow_except

RESTING_S = 600.0  # far longer than any test: such a rank is killed and not waited for


class Talker(Rank):
    """A rank that answers, rejects, fails or rests on request."""

    def where(self) -> tuple[int, str, str]:
        return self.rank, os.environ["WORLD_SIZE"], os.environ["LOCAL_WORLD_SIZE"]

    def agree_on(self, number: int) -> list[int]:
        """Returns the number that each rank was called with in this collective."""
        numbers = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
        dist.all_gather(numbers, torch.tensor([number]))
        return [int(one) for one in numbers]

    def raise_on(self, ranks: tuple[int, ...], error: Exception, others_rest: bool = False) -> int:
        if self.rank in ranks:
            raise error
        if others_rest:
            time.sleep(RESTING_S)
        return self.rank

    def rest(self) -> None:
        time.sleep(RESTING_S)

    def wait_for_peers_without_end(self, absent: int) -> None:
        if self.rank == absent:
            time.sleep(RESTING_S)
        dist.all_reduce(torch.ones(1))


class SecondCannotStart(Rank):
    def __init__(self, rank: int, *others: object) -> None:
        super().__init__(rank, *others)
        if rank == 1:
            raise OSError("no such device")


class SecondCannotMeet(Rank):
    def join(self, address: str, port: int) -> None:
        if self.rank == 1:
            raise OSError("no route to host")
        super().join(address, port)


def make(ranks: int = 2, actor_class: type[Rank] = Talker, **options: object) -> RankGroup:
    return RankGroup("talking", actor_class, ranks, **{"cpus_per_rank": CPUS, "start_timeout_s": 120.0, **options})


@pytest.fixture(scope="module")
def pair(ray_address):
    """Two ranks for the tests that do not end the group."""
    group = make()
    yield group
    group.close()


@pytest.fixture
def doomed(request, ray_address):
    """Two ranks, or the number in the parameter, for a test that ends them and must leave nothing behind."""
    with leaves_nothing():
        group = make(getattr(request, "param", 2))
        ranks = processes(group)
        yield group
        require_gone(ranks)


def test_answers_come_in_the_order_of_ranks_which_know_their_place(pair):
    assert pair.call_all("say where they are", "where") == [(0, "2", "2"), (1, "2", "2")]
    assert len(pair) == 2


def test_calls_of_many_threads_are_made_in_one_order_on_all_ranks(pair):
    def call(number: int) -> list[list[int]]:
        return pair.call_all("agree", "agree_on", number)

    with ThreadPoolExecutor(8) as callers:
        for number, answers in enumerate(callers.map(call, range(60))):
            assert answers == [[number, number]] * 2, "ranks met in a collective that were called for different things"


@pytest.mark.parametrize("error", [CheckpointError("no such file"), ValueError("rollout 3: too long")])
def test_what_all_ranks_refuse_is_refused_to_the_caller_and_the_group_goes_on(pair, error):
    with pytest.raises(type(error), match=str(error)):
        pair.call_all("do it", "raise_on", (0, 1), error)
    assert pair.call_all("agree", "agree_on", 7) == [[7, 7]] * 2


@pytest.mark.parametrize("serialize", [pickle.dumps, ray.cloudpickle.dumps, lambda group: ray.put([group])])
def test_the_handle_does_not_leave_its_process(pair, serialize):
    with pytest.raises(TypeError, match=r"stays in its process.*an actor of your own"):
        serialize(pair)


@pytest.mark.slow
def test_ranks_of_which_only_one_refuses_end(doomed):
    with pytest.raises(RankLost, match="some talking ranks rejected a call to load, others did not: no such file"):
        doomed.call_all("load", "raise_on", (0,), CheckpointError("no such file"))
    with pytest.raises(RankLost, match=r"has ended \(some talking ranks rejected.*restore another"):
        doomed.call_all("agree", "agree_on", 1)


@pytest.mark.slow
def test_a_rank_that_waits_for_one_that_refused_is_not_waited_for_without_end(doomed, monkeypatch):
    monkeypatch.setattr(rank_group, "AGREEMENT_TIMEOUT_S", 2.0)
    begin = time.monotonic()
    with pytest.raises(RankLost, match="some talking ranks rejected a call to load"):
        doomed.call_all("load", "raise_on", (1,), ValueError("mine is damaged"), True)
    assert time.monotonic() - begin < 30


@pytest.mark.slow
def test_what_no_rank_is_known_to_survive_ends_all(doomed):
    with pytest.raises(RankLost, match=r"talking rank 1 failed to add: ZeroDivisionError at .*: by nothing"):
        doomed.call_all("add", "raise_on", (1,), ZeroDivisionError("by nothing"), True)


@pytest.mark.parametrize("doomed", [1], indirect=True)
def test_a_loss_that_is_not_finite_ends_all(doomed):
    with pytest.raises(NonFiniteLossError, match=r"at step 3.*rollout 5"):
        doomed.call_all("update", "raise_on", (0,), NonFiniteLossError(3, ["rollout 5"]))
    with pytest.raises(RankLost, match="has ended"):
        doomed.call_all("agree", "agree_on", 1)


@pytest.mark.parametrize("doomed", [1], indirect=True)
def test_a_call_that_takes_too_long_says_what_was_waited_for(doomed):
    with pytest.raises(RankLost, match=r"waited 1\.5 s for 1 talking ranks to come to an end"):
        doomed.call_all("come to an end", "rest", timeout_s=1.5)


@pytest.mark.parametrize("killed", slow_except([1], [0, 1]))
def test_a_rank_that_is_killed_in_a_collective_ends_all_at_once(doomed, killed):
    ranks = processes(doomed)
    threading.Timer(2.0, lambda: os.kill(ranks[killed].pid, signal.SIGKILL)).start()
    begin = time.monotonic()
    with pytest.raises(RankLost, match=r"talking rank [01] (was lost during a call|failed) to meet once more"):
        doomed.call_all("meet once more", "wait_for_peers_without_end", killed)
    assert 1.5 < time.monotonic() - begin < 30
    begin = time.monotonic()
    with pytest.raises(RankLost, match="has ended"):
        doomed.call_all("agree", "agree_on", 1)
    assert time.monotonic() - begin < 1


@pytest.mark.slow
@pytest.mark.parametrize("doomed", [1], indirect=True)
def test_closing_ends_a_call_that_another_thread_waits_for(doomed):
    with ThreadPoolExecutor(1) as caller:
        call = caller.submit(doomed.call_all, "come to an end", "rest")
        time.sleep(1.0)
        doomed.close()
        doomed.close()
        with pytest.raises(RankLost):
            call.result(30)
    with pytest.raises(RankLost, match="it was shut down"):
        doomed.call_all("agree", "agree_on", 1)


def test_without_room_nothing_is_left_behind(ray_address):
    with leaves_nothing(), pytest.raises(PlacementError, match=r"2 talking ranks with {'CPU': 500} each .* within 3 s"):
        make(cpus_per_rank=500, start_timeout_s=3)


@pytest.mark.parametrize(
    ("actor_class", "message"),
    [
        pytest.param(
            SecondCannotStart, "rank 1 was lost during a call to join.*no such device", marks=pytest.mark.slow
        ),
        (SecondCannotMeet, r"rank 1 failed to join: OSError at .*: no route to host"),
    ],
)
def test_a_group_of_which_one_rank_cannot_start_leaves_nothing_behind(ray_address, actor_class, message):
    with leaves_nothing(), pytest.raises(RankLost, match=f"(?s){message}"):
        make(actor_class=actor_class)


@ray.remote(num_cpus=CPUS)
class Owner:
    """An actor whose placement group has bundles for ranks, as a replica of Ray Serve has."""

    def call(self) -> list[list[int]]:
        group = make(in_own_bundles=True)
        try:
            return group.call_all("agree", "agree_on", 5)
        finally:
            group.close()


@pytest.mark.slow
def test_ranks_in_the_bundles_of_their_owner_reserve_nothing_else(ray_address):
    with leaves_nothing():
        group = ray.util.placement_group([{"CPU": CPUS}] * 3)
        ray.get(group.ready(), timeout=60)
        reserved = ray.util.placement_group_table()
        owner = Owner.options(scheduling_strategy=PlacementGroupSchedulingStrategy(group, 0)).remote()
        assert ray.get(owner.call.remote(), timeout=120) == [[5, 5]] * 2
        assert ray.util.placement_group_table().keys() == reserved.keys()
        ray.kill(owner)
        ray.util.remove_placement_group(group)
