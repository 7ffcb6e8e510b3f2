"""A critic group that loses a shard, computes a loss that is not finite, or cannot start."""

import os
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from actors.ppo import critic_group
from actors.ppo.critic_group import CriticGroup, CriticOptions, CriticRank
from rlhf_critic.errors import CheckpointError, CriticError, NonFiniteLossError, PlacementError, RankLost
from tests.actors.groups import CPUS, Rollouts, leaves_nothing, make_rollouts, processes, require_gone
from tests.actors.ppo.critic_groups import CLIP, ROLLOUTS, make, options_of


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_run_that_lost_a_shard_ends_with_the_weights_of_one_that_did_not(ray_address, critics, tmp_path, monkeypatch):
    works = [make_rollouts(prompts=4, seed=seed) for seed in range(4)]
    large = make_rollouts(prompts=60, seed=9)
    with leaves_nothing():
        with make(critics["first"], 2, 3, token_budget=64) as group:
            for work in works[:2]:
                group.update(*work.arguments)
            group.save(tmp_path / "checkpoint")
            for work in works[2:]:
                group.update(*work.arguments)
            group.save(tmp_path / "undisturbed")
            ranks = processes(group._ranks)
            killed_at = kill_in_an_update(group, ranks[1], large)
            assert time.monotonic() - killed_at < 30
            require_gone(ranks)
            begin = time.monotonic()
            for call in (lambda: group.values([[3]]), group.state, group.offload):
                with pytest.raises(RankLost, match=r"(?s)critic group has ended.*restore another"):
                    call()
            assert time.monotonic() - begin < 1
        monkeypatch.chdir(tmp_path)
        with CriticGroup.restore("checkpoint", shards=2, cpus_per_shard=CPUS, start_timeout_s=200) as group:
            assert group.state() == critic_group.CriticState(2, 2, 3, 0)
            for work in works[2:]:
                group.update(*work.arguments)
            group.save("resumed")
    undisturbed, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("undisturbed", "resumed"))
    assert undisturbed.keys() == resumed.keys()
    for name, tensor in undisturbed.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=0, atol=1e-6)
    earlier = load_file(tmp_path / "checkpoint" / "model.safetensors")
    assert any((earlier[name] - tensor).abs().max() > 1e-3 for name, tensor in undisturbed.items())


def kill_in_an_update(group: CriticGroup, rank: psutil.Process, rollouts: Rollouts) -> float:
    """Kills a rank while the group updates repeatedly; returns the time of it on the monotonic clock."""
    killed_at = []

    def kill() -> None:
        killed_at.append(time.monotonic())
        os.kill(rank.pid, signal.SIGKILL)

    threading.Timer(2.0, kill).start()
    deadline = time.monotonic() + 60
    with pytest.raises(RankLost, match=r"critic rank [01] (was lost during a call|failed) to update the critic"):
        while time.monotonic() < deadline:
            group.update(*rollouts.arguments)
    return killed_at[0]


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_the_group(ray_address, critics):
    with leaves_nothing(), make(critics["first"], 2, 3) as group:
        ranks = processes(group._ranks)
        huge = ROLLOUTS.changed(2, returns=np.full_like(ROLLOUTS.returns[2], 1e30))
        with pytest.raises(NonFiniteLossError, match=r"not finite at step 0.*rollout 2\b"):
            group.update(*huge.arguments, clip=CLIP)
        require_gone(ranks)
        with pytest.raises(RankLost, match="has ended"):
            group.values([[3]])


class SecondCannotBuild(CriticRank):
    def build(self, options: CriticOptions) -> None:
        if self.rank == 1:
            raise CheckpointError("weights.safetensors: not on this node")
        super().build(options)


@pytest.mark.slow
def test_a_group_that_cannot_start_leaves_nothing_behind(ray_address, critics, tiny_model, tmp_path, monkeypatch):
    headless = shutil.copytree(critics["first"], tmp_path / "headless")
    weights = load_file(headless / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, headless / "model.safetensors", metadata={"format": "pt"})
    with leaves_nothing():
        with pytest.raises(CheckpointError, match=r"score\.weight"):
            make(str(headless), 2, 3)
        with pytest.raises(CriticError, match="nowhere"):
            make(str(tmp_path / "nowhere"), 2, 3)
        with pytest.raises(PlacementError, match=r"critic ranks .* could not be placed within 3 s"):
            CriticGroup(options_of(tiny_model, 0), 2, cpus_per_shard=400, start_timeout_s=3)
        with pytest.raises(CheckpointError, match="not a checkpoint of a critic group"):
            CriticGroup.restore(with_manifest(critics["first"], tmp_path / "other"))
        monkeypatch.setattr(CriticGroup, "rank_class", SecondCannotBuild)
        with pytest.raises(RankLost, match=r"some critic ranks rejected a call to build the critic.*not on this node"):
            make(tiny_model, 2, 0)


def with_manifest(critic: str, copy: Path) -> Path:
    """Makes a complete critic as a preference run saves it, which is not a group's."""
    from rlhf_critic.files import write_manifest

    shutil.copytree(critic, copy)
    write_manifest(copy, 0, 1)
    return copy
