"""The online critic is one critic, however many shards it has: its values, updates and checkpoints are those of a loop.

Groups take seconds to start, so most tests share one after a complete run (`Life`). Its learning rate has reached 0, so
further updates change nothing. Knows nothing about policies.
"""

import itertools
import json
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import ray
import torch

from actors.ppo.critic_group import CriticGroup
from actors.ppo.engine_group import SharedSequences
from jobs.evaluate import evaluate
from rlhf_critic.checkpoint.critic_directory import RESUME_FOLDER, check_critic, load_critic, read_card
from rlhf_critic.config.deepspeed import deepspeed_config
from rlhf_critic.config.model import ModelConfig
from rlhf_critic.config.tools import EvaluateJobConfig
from rlhf_critic.config.train import TrainConfig
from rlhf_critic.errors import CheckpointError
from rlhf_critic.model.critic import Critic
from rlhf_critic.training.engine import ENGINE_STATE_NAME
from tests.actors.groups import CPUS, Rollouts, leaves_nothing, make_rollouts, processes
from tests.actors.ppo.critic_groups import CLIP, ROLLOUTS, STEPS, alone, assert_values, make
from tests.helpers import save_tiny_model, slow_except
from tests.plain_loop import PlainOptimizer

WORLDS = list(itertools.product((1, 2), (0, 1, 2, 3)))  # numbers of shards with ZeRO stages
PAIR = (2, 3)  # the one of the group that most tests look at


def loss_alone(critic: Critic, rollouts: Rollouts) -> torch.Tensor:
    """Returns the mean value loss of all response tokens, from its definition, one rollout at a time."""
    total, actions = torch.zeros(()), 0
    for ids, length, *numbers in zip(*rollouts.arguments, strict=True):
        values = critic.values(critic.batch_of([ids]))[0][length - 1 : len(ids) - 1]
        returns, old_values = (torch.from_numpy(one) for one in numbers)
        near = torch.minimum(torch.maximum(values, old_values - CLIP), old_values + CLIP)
        total = total + 0.5 * torch.maximum((values - returns) ** 2, (near - returns) ** 2).sum()
        actions += len(returns)
    return total / actions


@pytest.fixture(scope="module")
def plain_losses(critics) -> list[float]:
    """Losses of updates by torch only: no group, engine, DeepSpeed or batches."""
    critic = load_critic(critics["first"]).critic
    optimizer = PlainOptimizer(critic, "linear", round(0.2 * STEPS), STEPS)
    losses = []
    for _ in range(STEPS):
        loss = loss_alone(critic, ROLLOUTS)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
    return losses


@dataclass(frozen=True)
class Life:
    """A group after `STEPS` updates, between two of which its state was offloaded, with the results."""

    group: CriticGroup
    shards: int
    stage: int
    values_at_first: list[np.ndarray]
    losses: list[float]
    values_before: list[np.ndarray]
    offloaded_bytes: int
    refusals: list[str]
    values_after: list[np.ndarray]
    saved: Path

    @property
    def critic(self) -> Critic:
        """The critic that the group saved at the end."""
        return load_critic(self.saved).critic


def live(group: CriticGroup, shards: int, stage: int, saved: Path) -> Life:
    values_at_first = group.values(ROLLOUTS.sequences)
    losses = [group.update(*ROLLOUTS.arguments, clip=CLIP).loss for _ in range(STEPS // 2)]
    values_before = group.values(ROLLOUTS.sequences)
    offloaded_bytes = group.offload()
    assert group.state().offloaded_bytes == offloaded_bytes
    refusals = []
    for call in (
        lambda: group.values(ROLLOUTS.sequences),
        lambda: group.update(*ROLLOUTS.arguments, clip=CLIP),
        lambda: group.save(saved),
    ):
        with pytest.raises(ValueError) as refused:  # noqa: PT011  another test checks the message
            call()
        refusals.append(str(refused.value))
    assert group.offload() == offloaded_bytes, "what is away already leaves no second time"
    group.onload()
    assert group.state().offloaded_bytes == 0
    values_after = group.values(ROLLOUTS.sequences)
    losses += [group.update(*ROLLOUTS.arguments, clip=CLIP).loss for _ in range(STEPS - STEPS // 2)]
    group.save(saved, name="online")
    return Life(
        group,
        shards,
        stage,
        values_at_first,
        losses,
        values_before,
        offloaded_bytes,
        refusals,
        values_after,
        saved,
    )


@pytest.fixture(scope="module")
def pair(ray_address, critics, tmp_path_factory):
    """Two shards at ZeRO-3, where ranks wait for each other in every layer."""
    with make(critics["first"], *PAIR) as group:
        yield live(group, *PAIR, tmp_path_factory.mktemp("pair") / "saved")


@pytest.fixture(scope="module", params=slow_except([PAIR], WORLDS, of_fixture=True), ids=str)
def life(request, ray_address, critics, tmp_path_factory):
    if request.param == PAIR:
        yield request.getfixturevalue("pair")
        return
    shards, stage = request.param
    with make(critics["first"], shards, stage) as group:
        yield live(group, shards, stage, tmp_path_factory.mktemp("lives") / "saved")


def test_values_are_those_of_each_sequence_by_itself_in_one_process(life, critics):
    assert_values(life.values_at_first, alone(load_critic(critics["first"]).critic, ROLLOUTS.sequences))


def test_updates_are_those_of_a_plain_loop(life, plain_losses):
    np.testing.assert_allclose(life.losses, plain_losses, rtol=1e-4)
    assert life.losses[-1] < 0.9 * life.losses[0], "nothing was learned"


def test_offloading_takes_parameters_and_moments_away_and_brings_them_back_exactly(life, critics):
    size = 4 * sum(parameter.numel() for parameter in load_critic(critics["first"]).critic.parameters())
    copies = life.shards if life.stage == 0 else 1  # without sharding, every rank has all of it
    # Parameters and two moments. ZeRO adds copies of parameters and gradients and, at stage 3, buckets.
    config = deepspeed_config(ModelConfig(), TrainConfig(zero_stage=life.stage))
    buckets = 4 * config["zero_optimization"]["reduce_bucket_size"] * life.shards if life.stage == 3 else 0
    assert 2 * size * copies < life.offloaded_bytes - buckets < 9 * size * life.shards
    assert len(life.refusals) == 3
    assert all("call onload() first" in refusal for refusal in life.refusals)
    for before, after in zip(life.values_before, life.values_after, strict=True):
        np.testing.assert_array_equal(before, after)


def test_a_saved_critic_has_the_values_of_the_group(life):
    assert_values(life.group.values(ROLLOUTS.sequences), alone(life.critic, ROLLOUTS.sequences))
    assert read_card(life.saved).version == f"online@{STEPS}"


def test_work_for_fewer_than_all_shards_is_done(life):
    critic = life.critic
    for sequences in ([[5]], [[7, 8, 9]], [[5], list(range(3, 60))]):
        assert_values(life.group.values(sequences), alone(critic, sequences))
    numbers = np.ones(2, dtype=np.float32)
    one = Rollouts([[7, 8, 9]], [1], [numbers], [0.5 * numbers])
    loss = life.group.update(*one.arguments, clip=CLIP).loss
    assert loss == pytest.approx(loss_alone(critic, one).item(), rel=1e-4)


def test_callers_at_the_same_time_get_right_answers(pair):
    critic = pair.critic
    works = [make_rollouts(prompts=2, seed=seed) for seed in range(4)]
    values = [alone(critic, work.sequences) for work in works]
    losses = [loss_alone(critic, work).item() for work in works]

    def call(number: int) -> None:
        for turn in range(6):
            one = (number + turn) % len(works)
            if (number + turn // 2) % 2:
                assert_values(pair.group.values(works[one].sequences), values[one])
            else:
                loss = pair.group.update(*works[one].arguments, clip=CLIP).loss
                assert loss == pytest.approx(losses[one], rel=1e-4)

    with ThreadPoolExecutor(4) as callers:
        for caller in [callers.submit(call, number) for number in range(4)]:
            caller.result(200)


def test_what_is_saved_while_others_update_is_named_after_the_step_it_is_of(pair, tmp_path):
    done = threading.Event()

    def update() -> None:
        while not done.is_set():
            pair.group.update(*ROLLOUTS.arguments, clip=CLIP)

    with ThreadPoolExecutor(2) as callers:
        updates = [callers.submit(update) for _ in range(2)]
        try:
            for number in range(4):
                pair.group.save(tmp_path / str(number))
        finally:
            done.set()
        for one in updates:
            one.result(60)
    for number in range(4):
        step = json.loads((tmp_path / str(number) / RESUME_FOLDER / ENGINE_STATE_NAME).read_text())["step"]
        card = read_card(tmp_path / str(number))
        assert (card.version, card.training["step"]) == (f"critic@{step}", step)


def test_offloading_while_others_ask_refuses_them_and_breaks_nothing(pair):
    wanted = alone(pair.critic, ROLLOUTS.sequences)
    done = threading.Event()

    def ask() -> int:
        refused = 0
        while not done.is_set():
            try:
                values = pair.group.values(ROLLOUTS.sequences)
            except ValueError:
                refused += 1
            else:
                assert_values(values, wanted)
        return refused

    with ThreadPoolExecutor(3) as callers:
        asking = [callers.submit(ask) for _ in range(3)]
        try:
            for _ in range(4):
                pair.group.offload()
                time.sleep(0.3)
                pair.group.onload()
                time.sleep(0.3)
        finally:
            done.set()
        assert sum(one.result(60) for one in asking) > 0
    assert_values(pair.group.values(ROLLOUTS.sequences), wanted)


def test_the_handle_does_not_leave_its_process(pair):
    with pytest.raises(TypeError, match=r"critic group stays in its process.*an actor of your own"):
        ray.cloudpickle.dumps(pair.group)


@pytest.mark.parametrize(
    ("sequences", "message"),
    [
        ([], "the list of units is empty"),
        ([[3, 4], []], "sequence 1 is empty"),
        ([[3, 4], [3, 100_000]], "sequence 1: token ids from 3 to 100000"),
        ([[-1]], "sequence 0: token ids from -1"),
    ],
)
def test_values_of_what_is_no_sequence_are_refused_and_the_group_goes_on(pair, sequences, message):
    with pytest.raises(ValueError, match=message):
        pair.group.values(sequences)
    assert_values(pair.group.values([[3, 4]]), alone(pair.critic, [[3, 4]]))


NOTHING = np.zeros(0, dtype=np.float32)
BAD_UPDATES = [
    (Rollouts([], [], [], []), "no rollout has a response token"),
    (Rollouts([[3, 4]], [2], [NOTHING], [NOTHING]), "no rollout has a response token"),
    (ROLLOUTS.changed(3, returns=np.ones(1000)), r"rollout 3: returns has the shape \(1000,\)"),
    (ROLLOUTS.changed(2, returns=np.full_like(ROLLOUTS.returns[2], np.nan)), "rollout 2: returns is nan at action 0"),
    (ROLLOUTS.changed(0, old_values=np.full_like(ROLLOUTS.returns[0], np.inf)), "rollout 0: old_values is inf"),
    # Finite in fp64, infinite in the fp32 of the ranks.
    (ROLLOUTS.changed(2, returns=np.full(len(ROLLOUTS.returns[2]), 1e300)), "rollout 2: returns is inf at action 0"),
    (Rollouts([[3]], [0], [np.ones(1)], [np.ones(1)]), "rollout 0: a prompt of 0 tokens"),
    (Rollouts([[3, 4]], [1, 1], [np.ones(1)], [np.ones(1)]), "prompt_lengths has 2 entries"),
    (Rollouts([[3, 100_000]], [1], [np.ones(1)], [np.ones(1)]), "sequence 0: token ids from 3 to 100000"),
]


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize(("rollouts", "message"), BAD_UPDATES, ids=[message[:24] for _, message in BAD_UPDATES])
def test_an_update_on_what_does_not_fit_is_refused_and_the_group_goes_on(pair, rollouts, message):
    step = pair.group.state().step
    with pytest.raises(ValueError, match=message):
        pair.group.update(*rollouts.arguments, clip=CLIP)
    assert pair.group.state().step == step
    loss = pair.group.update(*ROLLOUTS.arguments, clip=CLIP).loss
    assert loss == pytest.approx(loss_alone(pair.critic, ROLLOUTS).item(), rel=1e-4)


def test_a_clip_that_is_no_distance_is_refused_and_the_group_goes_on(pair):
    with pytest.raises(ValueError, match="clip of values must be positive"):
        pair.group.update(*ROLLOUTS.arguments, clip=0.0)
    loss = pair.group.update(*ROLLOUTS.arguments, clip=CLIP).loss
    assert loss == pytest.approx(loss_alone(pair.critic, ROLLOUTS).item(), rel=1e-4)


def test_token_ids_that_calls_share_give_the_numbers_of_lists(pair):
    """Prompts and responses are separate, and updates take parts of them."""
    lengths = ROLLOUTS.prompt_lengths
    halves = [(ids[:length], ids[length:]) for ids, length in zip(ROLLOUTS.sequences, lengths, strict=True)]
    shared = SharedSequences(*zip(*halves, strict=True))
    assert_values(pair.group.values(shared), alone(pair.critic, ROLLOUTS.sequences))
    rows = [7, 2, 3, 11]
    part = Rollouts(*([column[row] for row in rows] for column in ROLLOUTS.arguments))
    loss = pair.group.update(shared.part(rows), *part.arguments[1:], clip=CLIP).loss
    assert loss == pytest.approx(loss_alone(pair.critic, part).item(), rel=1e-4)
    assert_values(pair.group.values(shared.part(rows).part([1, 3])), alone(pair.critic, part.sequences)[1::2])
    with pytest.raises(ValueError, match=r"rollout 1: returns has the shape"):
        pair.group.update(shared.part([2, 7]), lengths[:2], [part.returns[1]] * 2, [part.returns[1]] * 2)


def test_masks_leave_tokens_out_of_an_update(pair):
    """Numbers at tokens that the policy did not sample are not read."""
    masks = [np.arange(len(row)) % 3 != 1 for row in ROLLOUTS.returns]
    hidden = [np.where(mask, row, np.nan) for mask, row in zip(masks, ROLLOUTS.returns, strict=True)]
    total, actions = 0.0, 0
    for ids, length, mask, *numbers in zip(
        *ROLLOUTS.arguments[:2], masks, ROLLOUTS.returns, ROLLOUTS.old_values, strict=True
    ):
        one = pair.critic.values(pair.critic.batch_of([ids]))[0][length - 1 : len(ids) - 1][mask]
        returns, old_values = (torch.from_numpy(row[mask]) for row in numbers)
        near = torch.minimum(torch.maximum(one, old_values - CLIP), old_values + CLIP)
        total += 0.5 * torch.maximum((one - returns) ** 2, (near - returns) ** 2).sum().item()
        actions += int(mask.sum())
    arguments = *ROLLOUTS.arguments[:2], hidden, ROLLOUTS.old_values
    assert pair.group.update(*arguments, clip=CLIP, masks=masks).loss == pytest.approx(total / actions, rel=1e-4)
    with pytest.raises(ValueError, match="rollout 0: returns is nan"):
        pair.group.update(*arguments, clip=CLIP)
    with pytest.raises(ValueError, match="rollout 0: the mask has the dtype float64; it must be bool"):
        pair.group.update(*arguments, clip=CLIP, masks=[mask.astype(float) for mask in masks])


def eight_of_one_prompt() -> Rollouts:
    """Makes a prompt of 40 tokens and eight responses of 10, which share the prompt only."""
    sequences = [[*range(3, 43), *range(50 + 10 * n, 60 + 10 * n)] for n in range(8)]
    return Rollouts(sequences, [40] * 8, *([np.ones(10, dtype=np.float32)] * 8 for _ in range(2)))


def test_a_prompt_is_computed_once_for_all_its_rollouts(life):
    rollouts = eight_of_one_prompt()
    life.group.values(rollouts.sequences)
    metrics = life.group.update(*rollouts.arguments, clip=CLIP)
    assert metrics.tokens == 8 * 50
    # An update does not compute the last token, because no response token follows it.
    for computed, tokens in ((life.group.computed_tokens, 40 + 8 * 10), (metrics.computed_tokens, 40 + 8 * 9)):
        if life.shards == 1:
            assert computed == tokens
        else:
            assert tokens <= computed <= tokens + 40, "at most, each shard computes the prompt"


def test_a_saved_critic_is_a_critic_like_any_other(pair, preference_file, tmp_path):
    check_critic(pair.saved)
    config = EvaluateJobConfig(checkpoint=str(pair.saved), data=preference_file, cache_dir=str(tmp_path))
    evaluation, page = evaluate(config)
    assert 0 <= evaluation.accuracy.mean <= 1
    assert page.title == f"online@{STEPS}"


def test_a_directory_that_is_there_is_not_written_over(pair):
    before = sorted((path, path.stat().st_mtime_ns) for path in pair.saved.rglob("*"))
    with pytest.raises(CheckpointError, match="exists already"):
        pair.group.save(pair.saved)
    assert sorted((path, path.stat().st_mtime_ns) for path in pair.saved.rglob("*")) == before
    assert_values(pair.group.values([[3, 4]]), alone(pair.critic, [[3, 4]]))


def test_a_checkpoint_that_is_damaged_or_none_of_a_group_is_refused_before_anything_starts(pair, critics, tmp_path):
    damaged, partial = (Path(shutil.copytree(pair.saved, tmp_path / name)) for name in ("damaged", "partial"))
    (weights,) = damaged.glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    next(partial.glob("manifest-*")).unlink()
    with leaves_nothing():
        for directory, message in ((damaged, "damaged"), (partial, "incomplete"), (tmp_path / "no", "manifest")):
            with pytest.raises(CheckpointError, match=message):
                CriticGroup.restore(directory, shards=2)
            with pytest.raises(CheckpointError, match=message):
                pair.group.load(directory)
    assert pair.group.state().step >= STEPS, "the group answers afterwards"


@pytest.mark.slow
def test_another_number_of_shards_takes_up_a_checkpoint(pair):
    def go_on(group: CriticGroup) -> list[float]:
        return [group.update(*ROLLOUTS.arguments, clip=CLIP).loss for _ in range(3)]

    pair.group.load(pair.saved)
    with leaves_nothing(), CriticGroup.restore(pair.saved, shards=1, cpus_per_shard=CPUS) as alone:
        assert alone.state().step == STEPS
        np.testing.assert_allclose(go_on(alone), go_on(pair.group), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "shards", "stage"), [("tied_model", 2, 3), ("tiny_model", 1, 0)])
def test_a_base_model_starts_with_values_of_zero_and_becomes_a_critic(
    ray_address, request, tmp_path, model, shards, stage
):
    with make(request.getfixturevalue(model), shards, stage, warmup_fraction=0.0) as group:
        assert not np.concatenate(group.values(ROLLOUTS.sequences)).any()
        metrics = [group.update(*ROLLOUTS.arguments, clip=None) for _ in range(2)]
        assert metrics[0].loss == pytest.approx(np.mean(np.concatenate(ROLLOUTS.returns) ** 2) / 2, rel=1e-5)
        values = group.values(ROLLOUTS.sequences)
        assert np.concatenate(values).any()
        group.save(tmp_path / "saved")
        check_critic(tmp_path / "saved")
        assert_values(values, alone(load_critic(tmp_path / "saved").critic, ROLLOUTS.sequences))
        assert group.encoder.fingerprint == load_critic(tmp_path / "saved").encoder.fingerprint


@pytest.mark.slow
def test_offloading_gives_the_system_its_memory_back(ray_address, tmp_path):
    model = save_tiny_model(
        tmp_path / "larger", tie_word_embeddings=True, hidden_size=512, intermediate_size=1536, num_hidden_layers=6
    )
    with make(model, 2, 3, token_budget=64) as group:
        group.update(*make_rollouts(prompts=1).arguments)
        ranks = processes(group._ranks)
        before = [rank.memory_info().rss for rank in ranks]
        offloaded_bytes = group.offload()
        fallen = [one - rank.memory_info().rss for one, rank in zip(before, ranks, strict=True)]
        assert offloaded_bytes > 3 * 4 * 18e6, "parameters and two moments of 18 million weights"
        assert sum(fallen) > 0.7 * 3 * 4 * 18e6
        group.onload()
        assert len(group.values([[3, 4]])[0]) == 2
