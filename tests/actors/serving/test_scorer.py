"""One scorer alone: which critics it rejects, how it names versions, how often it reads a critic, and its shards."""

import asyncio
import gc
import io
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import ray
import torch

from actors.serving import control
from actors.serving import scorer as scorer_module
from actors.serving.scorer import LocalCritic, Scorer, version_name
from rlhf_critic.checkpoint.critic_directory import load_critic, read_card, weights_hash
from rlhf_critic.checkpoint.export import export_critic
from rlhf_critic.config.serve import CriticComponent, LengthPenalty, PythonComponent, ScorerConfig, ServeJobConfig
from rlhf_critic.errors import CheckpointError, ComponentError, ConfigError, ScorerUnavailable
from rlhf_critic.model.weights import WeightReader
from rlhf_critic.scoring.items import Adjusted
from tests.actors.scorers import make_conversations, rewards_by_engine
from tests.helpers import slow_except, wait_until

TOLERANCE = 1e-5


def test_a_published_critic_is_swapped_between_calls(critics):
    items = make_conversations(8)
    wanted = {name: rewards_by_engine(path, items) for name, path in critics.items()}
    configs = {name: ScorerConfig(checkpoint=path) for name, path in critics.items()}
    scorer = Scorer(configs["first"])
    with ThreadPoolExecutor(8) as callers:
        calls = [callers.submit(scorer.score, items) for _ in range(60)]
        scorer.publish(configs["second"])
        calls += [callers.submit(scorer.score, items) for _ in range(10)]
        for call in calls:
            scores = call.result(60)
            name = "first" if scores.model_version.startswith("tiny@1#") else "second"
            np.testing.assert_allclose(scores.rewards_S, wanted[name], atol=TOLERANCE)
    assert calls[-1].result().model_version == scorer.info().model_version
    assert scorer.info().model_version.startswith("tiny@2#")
    scorer.close()
    with pytest.raises(ScorerUnavailable, match="shutting down"):
        scorer.score(items)


def test_the_weights_of_a_critic_that_was_replaced_are_freed_though_nobody_collects_garbage(critics):
    """Simulates a replica, whose first critic Serve excludes from garbage collection."""
    scorer = Scorer(ScorerConfig(checkpoint=critics["first"], components=(CriticComponent(), LengthPenalty())))
    tensors = list(scorer._version.backend._critic.parameters())
    assert sum(tensor.numel() for tensor in tensors) > 10_000
    gc.freeze()
    try:
        scorer.publish(ScorerConfig(checkpoint=critics["second"]))
        assert sum(tensor.numel() for tensor in tensors) == 0
    finally:
        gc.unfreeze()
    assert len(scorer.score(make_conversations(2)).rewards_S) == 2
    scorer.close()


def test_the_weights_of_a_critic_that_is_refused_once_loaded_are_freed_too(critics, monkeypatch):
    loaded = []

    class Watched(LocalCritic):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            loaded.append(list(self._critic.parameters()))

    monkeypatch.setattr("actors.serving.scorer.LocalCritic", Watched)
    missing = PythonComponent(name="mine", function="nowhere:f")
    with pytest.raises(ConfigError, match="component 'mine'"):
        Scorer(ScorerConfig(checkpoint=critics["first"], components=(CriticComponent(), missing)))
    (tensors,) = loaded
    assert sum(tensor.numel() for tensor in tensors) == 0


def test_a_call_that_is_cancelled_while_it_is_encoded_is_not_computed(critics):
    computed, go_on = [], threading.Event()

    def on_batch(record):
        computed.append(record.sequences)
        assert go_on.wait(60)

    scorer = Scorer(ScorerConfig(checkpoint=critics["first"]), on_batch=on_batch)
    version = scorer._version
    scorer.score(make_conversations(1))  # the queue stops after this call

    async def cancel_one():
        with version._encoding:  # its thread waits for this lock
            asked = asyncio.create_task(scorer.score_async(make_conversations(4)))
            await asyncio.sleep(0.2)
            asked.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asked
        while not any(request.future.cancelled() for request in version.batcher._queue):
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(cancel_one(), 60))
    go_on.set()
    scorer.score(make_conversations(1))
    scorer.close()
    assert computed == [1, 1]


def test_a_version_names_all_that_decides_a_reward(critics):
    config = ScorerConfig(checkpoint=critics["first"])
    scorer = Scorer(config)
    seen = {scorer.info().model_version}
    for changes in (
        {"normalize": True},
        {"components": (CriticComponent(), LengthPenalty())},
        {"components": (CriticComponent(weight=2.0),)},
        {"checkpoint": critics["second"]},
    ):
        scorer.publish(config.model_copy(update=changes))
        assert scorer.info().model_version not in seen
        seen.add(scorer.info().model_version)
    scorer.publish(config.model_copy(update={"token_budget": 64}))
    assert scorer.info().model_version in seen, "a token budget changes no reward"
    scorer.close()


def test_what_is_not_what_was_published_is_refused_and_changes_nothing(critics, tmp_path):
    config = ScorerConfig(checkpoint=critics["first"], digest=weights_hash(critics["first"]))
    scorer = Scorer(config)
    before = scorer.info()
    with pytest.raises(CheckpointError, match="these files are not the published ones"):
        scorer.publish(config.model_copy(update={"checkpoint": critics["second"]}))
    unscaled = shutil.copytree(critics["second"], tmp_path / "unscaled")
    card = read_card(unscaled).model_copy(update={"reward_std": None})
    (unscaled / "critic.json").write_text(card.model_dump_json())
    with pytest.raises(CheckpointError, match="no reward mean and standard deviation"):
        scorer.publish(ScorerConfig(checkpoint=str(unscaled), normalize=True))
    missing = PythonComponent(name="mine", function="nowhere:f")
    with pytest.raises(ConfigError, match="component 'mine'"):
        scorer.publish(config.model_copy(update={"components": (CriticComponent(), missing)}))
    with pytest.raises(CheckpointError, match="no such directory"):
        scorer.publish(ScorerConfig(checkpoint="/nowhere"))
    assert scorer.info() == before
    assert len(scorer.score(make_conversations(2)).rewards_S) == 2
    scorer.close()


@pytest.fixture
def bytes_read(monkeypatch):
    """Collects the sizes of all reads of weights in this process, by Python's files and by safetensors."""
    sizes: list[int] = []
    open_path, read_tensor = Path.open, WeightReader.read

    class Counted(io.BufferedReader):
        def read(self, size=-1):
            block = super().read(size)
            sizes.append(len(block))
            return block

    def open_counted(path, *arguments, **options):
        is_counted = path.suffix == ".safetensors"
        return Counted(io.FileIO(path)) if is_counted else open_path(path, *arguments, **options)

    def read_counted(reader, name):
        tensor = read_tensor(reader, name)
        sizes.append(tensor.nbytes)
        return tensor

    monkeypatch.setattr(Path, "open", open_counted)
    monkeypatch.setattr(WeightReader, "read", read_counted)
    return sizes


@pytest.mark.parametrize("has_manifest", [True, False])
def test_a_published_critic_is_read_once_by_the_driver_and_twice_by_a_replica(
    critics, tmp_path, bytes_read, has_manifest
):
    critic = critics["first"]
    if has_manifest:
        export_critic(critic, tmp_path / "export", auto_map=False)
        critic = str(tmp_path / "export")
    size = (Path(critic) / "model.safetensors").stat().st_size
    bytes_read.clear()
    config = control.checked(ServeJobConfig(checkpoint="-"), critic)
    assert size <= sum(bytes_read) < 1.1 * size, "the file for its hash, and the head"
    bytes_read.clear()
    Scorer(config).close()
    assert 1.8 * size < sum(bytes_read) <= 2 * size, "the file for its hash, and its tensors to load them"


def test_two_critics_of_one_name_are_told_apart_by_their_manifests(critics, tmp_path):
    hashes = set()
    for name, card in (("first", None), ("second", None), ("second", read_card(critics["first"]))):
        source = Path(shutil.copytree(critics[name], tmp_path / f"source-{len(hashes)}"))
        if card:
            (source / "critic.json").write_text(card.model_dump_json())
        export_critic(source, tmp_path / f"export-{len(hashes)}", auto_map=False)
        hashes.add(weights_hash(tmp_path / f"export-{len(hashes)}"))
    assert len(hashes) == 3
    damaged = tmp_path / "export-0" / "model.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"export-0/model\.safetensors: damaged"):
        Scorer(ScorerConfig(checkpoint=str(tmp_path / "export-0")))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("shards", slow_except([1], [1, 2]))
def test_a_remote_critic_is_downloaded_once(ray_address, critics, tmp_path, monkeypatch, shards):
    from ray.train import _checkpoint

    download = _checkpoint._download_from_fs_path
    remote = Path(shutil.copytree(critics["first"], tmp_path / "remote"))

    def download_and_remove(fs, fs_path, local_path):
        download(fs=fs, fs_path=fs_path, local_path=local_path)
        remote.rename(tmp_path / "gone")  # no process can download it again

    monkeypatch.setattr(_checkpoint, "_download_from_fs_path", download_and_remove)
    # Ray takes only pyarrow's own LocalFileSystem for local.
    scorer = Scorer(ScorerConfig(checkpoint=f"fsspec+file://{remote}"), shards=shards)
    items = make_conversations(3)
    wanted = rewards_by_engine(critics["first"], items)
    np.testing.assert_allclose(scorer.score(items).rewards_S, wanted, atol=TOLERANCE)
    scorer.close()
    assert (tmp_path / "gone").exists()


@pytest.mark.timeout(300)
def test_two_shards_give_the_rewards_of_one_and_leave_nothing_behind(ray_address, critics):
    free = ray.available_resources()["CPU"]
    items = make_conversations(30)
    scorer = Scorer(ScorerConfig(checkpoint=critics["first"], token_budget=128), shards=2)
    scores = scorer.score(items, values=True)
    np.testing.assert_allclose(scores.rewards_S, rewards_by_engine(critics["first"], items), atol=TOLERANCE)
    whole = Scorer(ScorerConfig(checkpoint=critics["first"]))
    for one, other in zip(scores.values, whole.score(items, values=True).values, strict=True):
        np.testing.assert_allclose(one, other, atol=TOLERANCE)
    # Concurrent callers must reach both shards in the same order.
    with ThreadPoolExecutor(6) as callers:
        for call in [callers.submit(scorer.score, items[n : n + 5]) for n in range(0, 25, 5)]:
            call.result(120)
    scorer.check_healthy()
    ray.kill(scorer._version.backend._group._ranks[1])
    with pytest.raises(ScorerUnavailable, match="lost one of its 2 shards"):
        scorer.score(items)
    with pytest.raises(ScorerUnavailable, match="start the scorer again"):
        scorer.check_healthy()
    scorer.close()
    wait_until(lambda: ray.available_resources().get("CPU", 0) == free, "the shards' CPUs", 60)


STARTS_WITHOUT_DEEPSPEED = """
import sys
from actors.serving.scorer import Scorer
from rlhf_critic.config.serve import ScorerConfig
from rlhf_critic.scoring.items import Conversation

scorer = Scorer(ScorerConfig(checkpoint=sys.argv[1]))
scorer.score([Conversation("please", "thank you")])
scorer.close()
assert "deepspeed" not in sys.modules
"""


def test_a_scorer_starts_and_scores_without_importing_deepspeed(critics):
    subprocess.run([sys.executable, "-c", STARTS_WITHOUT_DEEPSPEED, critics["first"]], check=True)


def test_the_text_of_each_token_is_answered_beside_its_value(critics):
    items = make_conversations(4)
    scorer = Scorer(ScorerConfig(checkpoint=critics["first"]))
    assert scorer.score(items).token_texts is None
    scores = scorer.score([Adjusted(item, token_texts=True) for item in items], values=True)
    scorer.close()
    encoder = load_critic(critics["first"]).encoder
    for item, texts, values_T in zip(items, scores.token_texts, scores.values, strict=True):
        assert len(texts) == len(values_T)
        assert encoder.render(*item).endswith("".join(texts))


def test_the_encoder_of_a_scorer_is_that_of_the_critic(critics):
    scorer = Scorer(ScorerConfig(checkpoint=critics["first"]))
    assert scorer.info().fingerprint == load_critic(critics["first"]).encoder.fingerprint
    scorer.close()


HANGS = threading.Event()


def hang(prompts, responses):
    """A component that waits for ever, as for a network."""
    HANGS.wait(120)
    return [0.0] * len(responses)


def test_a_component_that_hangs_leaves_publishing_and_the_next_version_alone(critics):
    component = PythonComponent(name="judge", function=f"{__name__}:hang", timeout_s=1.0)
    plain = ScorerConfig(checkpoint=critics["first"])
    judged = plain.model_copy(update={"components": (CriticComponent(), component)})
    scorer = Scorer(judged)
    items = make_conversations(3)

    async def main():
        hanging = [asyncio.create_task(scorer.score_async(items)) for _ in range(20)]
        await asyncio.sleep(0.2)
        await asyncio.to_thread(scorer.publish, plain)
        scores = await scorer.score_async(items)
        np.testing.assert_allclose(scores.rewards_S, rewards_by_engine(critics["first"], items), atol=TOLERANCE)
        for answer in await asyncio.gather(*hanging, return_exceptions=True):
            assert isinstance(answer, ComponentError)
            assert "no answer within 1 s" in str(answer)

    HANGS.clear()
    try:
        asyncio.run(asyncio.wait_for(main(), 60))
    finally:
        HANGS.set()
    scorer.close()


def test_a_time_limit_decides_no_reward(critics):
    """Otherwise a pool would have a new version after an upgrade that adds one."""
    config = ScorerConfig(checkpoint=critics["first"])
    names = set()
    for timeout_s in (1.0, 60.0):
        component = PythonComponent(name="judge", function=f"{__name__}:hang", timeout_s=timeout_s)
        limited = config.model_copy(update={"components": (CriticComponent(), component)})
        names.add(version_name("v", "d", limited, "float32"))
    assert len(names) == 1


def test_a_dtype_decides_rewards_and_is_in_the_name(critics):
    items = make_conversations(6)
    scorer = Scorer(ScorerConfig(checkpoint=critics["first"]))
    expected, name = scorer.score(items).rewards_S, scorer.info().model_version
    scorer.publish(ScorerConfig(checkpoint=critics["first"], dtype="float32"))
    assert scorer.info().model_version == name, "auto is float32 on a CPU"
    scorer.publish(ScorerConfig(checkpoint=critics["first"], dtype="bfloat16"))
    rewards = scorer.score(items).rewards_S
    assert scorer.info().model_version != name
    assert not np.array_equal(rewards, expected)
    np.testing.assert_allclose(rewards, expected, atol=0.05)
    scorer.close()


def test_a_gpu_that_is_missing_is_named(critics):
    with pytest.raises(ConfigError, match=r"torch finds no GPU.*nvidia-smi"):
        Scorer(ScorerConfig(checkpoint=critics["first"]), use_gpu=True)


def test_a_scorer_whose_device_broke_is_not_healthy(critics, monkeypatch):
    scorer = Scorer(ScorerConfig(checkpoint=critics["first"]))

    def fails(*arguments, **options):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(scorer._version.backend, "_forward", fails)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        scorer.score(make_conversations(1))
    scorer.check_healthy()  # a CPU still works after an error of one batch
    monkeypatch.setattr(scorer_module, "is_working", lambda device: False)
    for _ in range(2):
        with pytest.raises(ScorerUnavailable, match=r"does not work any more.*illegal memory access"):
            scorer.score(make_conversations(1))
    with pytest.raises(ScorerUnavailable, match="does not work any more"):
        scorer.check_healthy()
    scorer._version.batcher.close(30)


def test_a_micro_batch_that_does_not_fit_is_computed_in_parts(critics, monkeypatch):
    scorer = Scorer(ScorerConfig(checkpoint=critics["first"]))
    items = make_conversations(9)
    expected = scorer.score(items).rewards_S
    forward = scorer._version.backend._forward

    def small_only(sequences, rewards_only):
        if len(sequences) > 2:
            raise torch.OutOfMemoryError("tried to allocate")
        return forward(sequences, rewards_only)

    monkeypatch.setattr(scorer._version.backend, "_forward", small_only)
    np.testing.assert_allclose(scorer.score(items).rewards_S, expected, atol=TOLERANCE)
    scorer.check_healthy()
    monkeypatch.setattr(scorer._version.backend, "_forward", lambda *_: small_only(range(3), True))
    with pytest.raises(ScorerUnavailable, match=r"tokens in 1 sequences do not fit.*lower token_budget or max_tokens"):
        scorer.score(items[:1])
    scorer.close()


def test_a_critic_that_computes_without_end_is_not_healthy(critics, monkeypatch):
    scorer = Scorer(ScorerConfig(checkpoint=critics["first"]))
    started, go_on = threading.Event(), threading.Event()
    forward = scorer._version.batcher._forward

    def slow(*arguments):
        started.set()
        assert go_on.wait(60)
        return forward(*arguments)

    scorer._version.batcher._forward = slow
    monkeypatch.setattr(scorer_module, "STUCK_S", 0.05)
    scorer.check_healthy()
    with ThreadPoolExecutor(1) as threads:
        call = threads.submit(scorer.score, make_conversations(1))
        assert started.wait(30)
        time.sleep(0.1)
        with pytest.raises(ScorerUnavailable, match="one micro-batch for more than"):
            scorer.check_healthy()
        go_on.set()
        call.result(30)
    scorer.close()
