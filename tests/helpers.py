"""Helpers that tests share: tiny models, data, groups of ranks, processes."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import ray

if TYPE_CHECKING:  # ranks of tests import this file, and transformers takes seconds
    from transformers import LlamaConfig

WORDS = (
    "please thank you very kindly for the helpful answer of course I am glad to explain how this works "
    "no whatever go away that is a stupid question and nobody cares about it 1 2 3 4 , . ! ? naïve café"
).split()
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{{ eos_token }}{% endfor %}"
)
RANK_TIMEOUT_S = 600


def slow_except(quick: Collection[Any], cases: Iterable[Any], of_fixture: bool = False) -> list[Any]:
    """Returns cases for ``parametrize``, or for a fixture's ``params``; all but the quick ones are marked as slow."""
    cases = list(cases)
    unknown = [case for case in quick if case not in cases]
    if unknown:
        raise ValueError(f"no such cases: {unknown}")

    def marked(case: Any) -> Any:
        values = case if isinstance(case, tuple) and not of_fixture else (case,)
        return pytest.param(*values, marks=pytest.mark.slow)

    return [case if case in quick else marked(case) for case in cases]


# ZeRO stages with numbers of ranks. `make test` has one rank, and two at the stages that shard gradients and weights.
STAGES_ON_RANKS = slow_except([(0, 1), (2, 2), (3, 2)], itertools.product((0, 1, 2, 3), (1, 2)))


def save_tiny_tokenizer(
    directory: Path, *, pad_is_eos: bool = False, adds_bos: bool = False, chat_template: str | None = CHAT_TEMPLATE
) -> str:
    """Trains a byte-level BPE tokenizer on a few words, saves it, and returns its directory."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(
        vocab_size=333,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", model_max_length=4096
    )
    if pad_is_eos:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(directory)
    return str(directory)


def tiny_config(vocab_size: int, **changes: Any) -> LlamaConfig:
    """Returns the config of a two-layer Llama with grouped queries."""
    from transformers import LlamaConfig

    options = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    }
    return LlamaConfig(**{**options, **changes})


def save_tiny_model(
    directory: Path, *, tie_word_embeddings: bool, pad_is_eos: bool = False, std: float = 0.15, **changes: Any
) -> str:
    """Saves a causal language model with its tokenizer; returns its directory. ``std`` is that of its matrices."""
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    save_tiny_tokenizer(directory, pad_is_eos=pad_is_eos)
    vocab_size = len(PreTrainedTokenizerFast.from_pretrained(directory))
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config(vocab_size, tie_word_embeddings=tie_word_embeddings, **changes))
    # A fresh Llama is nearly constant; larger weights make rewards differ enough to compare.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, std)
    model.save_pretrained(directory)
    return str(directory)


def make_preferences(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Returns preferences in which the polite answer wins; texts have 1 to 40 words."""
    rng = random.Random(seed)

    def words(pool: list[str]) -> str:
        return " ".join(rng.choice(pool) for _ in range(rng.randint(1, 40)))

    polite, rude = WORDS[:20], WORDS[20:]
    return [{"prompt": words(WORDS), "chosen": words(polite), "rejected": words(rude)} for _ in range(count)]


def write_preferences(path: Path, count: int, seed: int = 0) -> str:
    """Writes `make_preferences` as JSON lines; returns the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in make_preferences(count, seed)), encoding="utf-8")
    return str(path)


@ray.remote(num_cpus=0.1, max_restarts=0)
class _Rank:
    def __init__(self, rank: int, world_size: int) -> None:
        import torch

        self.rank, self.world_size = rank, world_size
        torch.set_num_threads(1)

    def join(self, store_directory: str) -> None:
        import torch.distributed as dist

        from rlhf_critic.training.process_group import init_distributed

        os.environ.update(RANK=str(self.rank), WORLD_SIZE=str(self.world_size), LOCAL_RANK=str(self.rank))
        dist.init_process_group(
            "gloo", init_method=f"file://{store_directory}/store", rank=self.rank, world_size=self.world_size
        )
        init_distributed("gloo")

    def run(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        return function(*arguments)


class RankGroup:
    """Ranks in processes of their own (Ray actors), which run a function together as in a training job."""

    def __init__(self, world_size: int) -> None:
        import tempfile

        self._actors = [_Rank.remote(rank, world_size) for rank in range(world_size)]  # type: ignore[attr-defined]
        store = tempfile.mkdtemp()
        ray.get([actor.join.remote(store) for actor in self._actors], timeout=RANK_TIMEOUT_S)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Runs ``function(*arguments)`` on every rank; returns the result of each."""
        return ray.get([actor.run.remote(function, arguments) for actor in self._actors], timeout=RANK_TIMEOUT_S)

    def shutdown(self) -> None:
        """Ends the processes."""
        for actor in self._actors:
            ray.kill(actor)


def run_command(
    arguments: list[str], cwd: Path | str, env: Mapping[str, str] | None = None, timeout: float = 280
) -> subprocess.CompletedProcess[str]:
    """Runs ``python ARGUMENTS`` as a user would; returns the completed process."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def submit_job(
    dashboard: str, arguments: list[str], *options: str, timeout: float = 280
) -> subprocess.CompletedProcess[str]:
    """Runs ``ray job submit -- python -m ARGUMENTS`` in the repository; returns the completed process."""
    submit = ["submit", "--address", dashboard, *options, "--working-dir", "."]
    done: list[subprocess.CompletedProcess[str]] = []

    def was_taken() -> bool:
        """Submits the job. On a busy machine Ray's agent that starts jobs is ready some time after Ray itself."""
        done[:] = [ray_job(dashboard, *submit, "--", sys.executable, "-m", *arguments, timeout=timeout)]
        return "No available agent" not in done[0].stdout + done[0].stderr

    wait_until(was_taken, "an agent that takes the job")
    return done[0]


def ray_job(dashboard: str, *arguments: str, timeout: float = 280) -> subprocess.CompletedProcess[str]:
    """Runs ``ray job ARGUMENTS``, with the address in RAY_ADDRESS too, which would otherwise name another Ray."""
    return subprocess.run(
        [str(Path(sys.executable).with_name("ray")), "job", *arguments],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "RAY_ADDRESS": dashboard},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def wait_until(condition: Callable[[], bool], what: str | Callable[[], str], timeout: float = 240) -> None:
    """Waits for a condition; raises an error that names ``what``, called if it is a function, if it stays false."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout} s for {what() if callable(what) else what}")
        time.sleep(0.05)
