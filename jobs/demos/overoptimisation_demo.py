"""``make overoptimisation-demo``: best-of-n by mean, pessimistic and ensemble rewards, against known human ratings.

The gold scorer is known: the mean of human ratings. A proxy is a linear head on hidden states of a pretrained model,
trained on 100 preferences with wrong labels among them. Best-of-n takes the text with the highest proxy reward of n
texts from a pool, and is measured by the gold scorer (as in Gao et al., "Scaling Laws for Reward Model
Overoptimization", 2023). Compared are the proxy's reward, its reward minus K standard deviations, and the mean of three
proxies on resamples of the same preferences. Nothing is sampled from a policy, so proxies are the only noise.

Shape legend: T texts, D hidden size, P preferences, N numbers of texts to choose from.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor

from jobs.cli import run_job
from jobs.quickstart import CONFIG
from jobs.quickstart_data import (
    RATINGS_REQUIREMENT,
    RATINGS_SHA256,
    RatedText,
    download,
    download_model,
    read_ratings,
)
from rlhf_critic.config.base import load_config_file
from rlhf_critic.config.train import TrainJobConfig
from rlhf_critic.data.encoding import create_encoder
from rlhf_critic.evaluation.plots import save_best_of_n_curves
from rlhf_critic.files import atomic_file, write_text_atomically
from rlhf_critic.model.factory import create_critic_model
from rlhf_critic.scoring.local import rewards_and_states
from rlhf_critic.training.posterior_fit import Unit, fit_head_posterior

OUT = Path("docs/overoptimisation")
CACHE = Path(".cache/overoptimisation/states.npy")
TEXTS_PER_COLLECTION = 1500
SEEDS = 3
PROXIES = 3  # of an ensemble
PREFERENCES, VALIDATION, LABEL_NOISE = 100, 60, 0.15
NUMBERS = [1, 2, 4, 8, 16, 32, 64, 128, 256]
PESSIMISM = (1.0, 2.0)
# Where the preferences come from; the pool has texts of all collections.
SETTINGS = {"preferences of all collections": None, "preferences of one collection (tweets)": "tweets"}

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Proxy:
    """Rewards of a proxy for every text, and their standard deviations."""

    rewards_T: Array
    stds_T: Array


def main() -> None:
    """Runs the comparison, prints a table, and writes a plot and its numbers."""
    started = time.perf_counter()
    texts, collections = rated_texts()
    gold_T = np.array([one.rating for one in texts])
    states_TD = hidden_states([one.text for one in texts])
    results = {name: compare(states_TD, gold_T, collections, only) for name, only in SETTINGS.items()}
    OUT.mkdir(parents=True, exist_ok=True)
    save_best_of_n_curves(NUMBERS, results, OUT / "best-of-n.png")
    gold = {name: {way: curve.round(4).tolist() for way, curve in one.items()} for name, one in results.items()}
    numbers = {"n": NUMBERS, "gold": gold}
    write_text_atomically(OUT / "best-of-n.json", json.dumps(numbers, indent=1) + "\n")
    for name, curves in results.items():
        Console().print(table(name, curves))
    print(f"wrote {OUT}/best-of-n.png in {time.perf_counter() - started:.0f} s")


def rated_texts() -> tuple[list[RatedText], list[str]]:
    """Returns texts with human ratings, and the collection of each."""
    with tempfile.TemporaryDirectory() as scratch:
        sdist = download(RATINGS_REQUIREMENT, RATINGS_SHA256, Path(scratch), "--no-binary", ":all:")
        ratings = read_ratings(sdist)
    rng = np.random.default_rng(0)
    chosen = [
        (texts[index], name)
        for name, texts in ratings.items()
        for index in rng.permutation(len(texts))[:TEXTS_PER_COLLECTION]
    ]
    return [text for text, _ in chosen], [name for _, name in chosen]


def hidden_states(texts: Sequence[str]) -> Tensor:
    """Computes the last hidden state of each text, fp32 ``[T, D]``, with the quickstart's pretrained model."""
    if CACHE.exists():
        return torch.from_numpy(np.load(CACHE))
    config = load_config_file(TrainJobConfig, str(CONFIG))
    download_model(Path(config.model.path))
    encoder = create_encoder(config.model.path, config.encoding)
    critic = create_critic_model(
        config.model.path, encoder.tokenizer, None, num_layers=config.model.num_layers, disable_dropout=True
    ).eval()
    ids = [encoder.encode("", text).ids for text in texts]
    parts = [rewards_and_states(critic, ids[start : start + 1000], 2048)[1] for start in range(0, len(ids), 1000)]
    states_TD = torch.cat(parts)
    CACHE.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(CACHE) as temporary, temporary.open("wb") as file:
        np.save(file, states_TD.numpy())
    return states_TD


def compare(states_TD: Tensor, gold_T: Array, collections: Sequence[str], only: str | None) -> dict[str, Array]:
    """Returns the mean gold reward of best-of-n for each way to choose, by seed and number, ``[SEEDS, N]``.

    Proxies are trained on texts of the collection ``only``, or of all. Texts of proxies are not in the pool.
    """
    curves: dict[str, list[list[float]]] = {}
    for seed in range(SEEDS):
        rng = np.random.default_rng(seed)
        is_pool = rng.random(len(gold_T)) < 0.5
        of_proxies = np.flatnonzero(~is_pool & np.array([only in (None, name) for name in collections]))
        pairs_P2 = np.array([_preference(gold_T, of_proxies, rng) for _ in range(PREFERENCES + VALIDATION)])
        train_P2, held_out_P2 = pairs_P2[:PREFERENCES], pairs_P2[PREFERENCES:]
        first, pool_gold = train_proxy(states_TD, train_P2, held_out_P2), gold_T[is_pool]
        resamples = [train_P2[rng.integers(0, PREFERENCES, PREFERENCES)] for _ in range(PROXIES)]
        proxies = [train_proxy(states_TD, resample, held_out_P2) for resample in resamples]
        ways = {"one proxy": first.rewards_T}
        ways |= {f"minus {k:g} standard deviations": first.rewards_T - k * first.stds_T for k in PESSIMISM}
        ways["mean of three proxies"] = np.mean([one.rewards_T for one in proxies], axis=0)
        ways["gold scorer"] = gold_T
        for way, score_T in ways.items():
            curves.setdefault(way, []).append([best_of_n(score_T[is_pool], pool_gold, n) for n in NUMBERS])
    return {way: np.array(of_seeds) for way, of_seeds in curves.items()}


def train_proxy(states_TD: Tensor, train_P2: NDArray[np.int64], held_out_P2: NDArray[np.int64]) -> Proxy:
    """Trains a head on preferences by maximum likelihood with a Gaussian prior, and fits its posterior.

    The prior's precision is the one of the lowest validation log-loss; the validation preferences are noisy as well.
    """
    scaled_TD = (states_TD - states_TD.mean(dim=0)) / states_TD.std()
    train_PD, held_out_PD = (scaled_TD[pairs[:, 0]] - scaled_TD[pairs[:, 1]] for pairs in (train_P2, held_out_P2))
    heads = [_fit_head(train_PD, precision) for precision in np.logspace(-1, 4, 11)]
    losses = [float(torch.nn.functional.softplus(-(held_out_PD @ head)).mean()) for head in heads]
    head_D = heads[int(np.argmin(losses))]
    rewards_T = scaled_TD @ head_D

    def states_of(units: Sequence[Unit]) -> Iterator[tuple[Tensor, Tensor]]:
        for unit in units:
            yield rewards_T[list(unit)], scaled_TD[list(unit)]

    posterior, _ = fit_head_posterior(train_P2.tolist(), held_out_P2.tolist(), states_of)
    return Proxy(rewards_T.double().numpy(), posterior.stds(scaled_TD).double().numpy())


def _preference(gold_T: Array, texts: NDArray[np.int64], rng: np.random.Generator) -> tuple[int, int]:
    """Returns two texts, the better first, or the worse with the probability of a wrong label."""
    first, second = rng.choice(texts, 2, replace=False)
    is_right = (gold_T[first] > gold_T[second]) != (rng.random() < LABEL_NOISE)
    return (int(first), int(second)) if is_right else (int(second), int(first))


def _fit_head(differences_PD: Tensor, precision: float) -> Tensor:
    head_D = torch.zeros(differences_PD.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([head_D], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.softplus(-(differences_PD @ head_D)).sum() + precision / 2 * head_D.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return head_D.detach()


def best_of_n(score_T: Array, gold_T: Array, n: int) -> float:
    """Computes the expected gold reward of the text with the highest score among n, drawn with replacement.

    It is exact: the text of rank i among T is the highest of n with probability ``(i / T)^n - ((i - 1) / T)^n``.
    """
    ranks = np.arange(len(score_T) + 1) / len(score_T)
    return float(np.diff(ranks**n) @ gold_T[score_T.argsort(kind="stable")])


def table(name: str, curves: dict[str, Array]) -> Table:
    """Returns the mean over seeds of each way to choose, and its standard error."""
    shown = Table("way to choose", *(f"n={n}" for n in NUMBERS[::2]), title=name, title_justify="left")
    for way, curve in curves.items():
        mean, error = curve.mean(axis=0), curve.std(axis=0, ddof=1) / np.sqrt(len(curve))
        shown.add_row(way, *(f"{mean[i]:.2f} ± {error[i]:.2f}" for i in range(0, len(NUMBERS), 2)))
    return shown


if __name__ == "__main__":
    run_job(main)
