"""``make overoptimisation-demo``: PPO against mean, pessimistic and ensemble rewards of proxies, and a known gold rule.

A response is at most 16 words. The gold scorer is a rule: one point for each different good word, minus a quarter for
every other word, a repeated good word among them. A proxy is a critic of two layers, trained on 150 preferences between
texts of the initial policy, with 15 % wrong labels among them. So it has never seen what a trained policy writes. PPO
maximises the proxy's reward, its reward minus K standard deviations, or the mean of three proxies on resamples of the
same preferences. The gold rule measures what the policy became.

Shape legend: S responses or seeds, P preferences, I iterations.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from jobs.cli import run_job
from jobs.demos import tiny_ppo
from jobs.demos.tiny_ppo import SPECIAL_WORDS, Records, Task
from rlhf_critic.algorithms.head_posterior import HeadPosterior
from rlhf_critic.batching.prefix_tree import TokenIds
from rlhf_critic.config.model import BodyConfig
from rlhf_critic.config.ppo import AlgorithmConfig
from rlhf_critic.data.encoding import load_tokenizer
from rlhf_critic.evaluation.plots import save_comparison
from rlhf_critic.files import write_text_atomically
from rlhf_critic.model.critic import Critic
from rlhf_critic.model.factory import create_critic_model
from rlhf_critic.model.generation import Response, TransformersGenerator
from rlhf_critic.scoring.local import rewards_and_states
from rlhf_critic.training.posterior_fit import Unit, fit_head_posterior, last_states_of

GOOD, FILLER, RESPONSE_TOKENS = 8, 16, 16
WORDS = ["say", *(f"good{number}" for number in range(GOOD)), *(f"word{number}" for number in range(FILLER))]
PROMPT = [len(SPECIAL_WORDS)]  # the word "say"
FIRST_GOOD, EOS = PROMPT[0] + 1, SPECIAL_WORDS.index("[eos]")
PREFERENCES, VALIDATION, LABEL_NOISE = 150, 300, 0.15
PROXY_STEPS, PROXY_BATCH, PROXY_RATE = 200, 30, 1e-3
TOKEN_BUDGET = 16384
ITERATIONS, PROMPTS = 60, 16
DIRECTORY = Path("runs/overoptimisation-ppo")
OUT = Path("docs/overoptimisation")
SEEDS = (3, 4, 5)  # the settings were chosen with others
ALGORITHM = AlgorithmConfig(
    iterations=ITERATIONS,
    critic_epochs=2,
    critic_lambda=1.0,
    gae_lambda=1.0,
    kl_coefficient=0.0,
    value_warmup_iterations=2,
)
# By name: the number of proxies, and the standard deviations that are subtracted.
METHODS = {
    "proxy": (1, 0.0),
    "proxy - 1 std": (1, 1.0),
    "proxy - 2 std": (1, 2.0),
    "mean of 3 proxies": (3, 0.0),
}
COMPARED = {"gold": "gold reward", "reward": "reward that the policy was trained on"}
SHOWN = (1, 15, 30, ITERATIONS)


def main() -> None:
    """Makes all runs, draws their curves and prints the result."""
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    tiny_ppo.save_model(DIRECTORY / "model", WORDS)
    wanted = [(method, seed) for seed in SEEDS for method in METHODS]
    runs: dict[str, list[Records]] = {method: [] for method in METHODS}
    for (method, _), records in zip(wanted, tiny_ppo.run_all(run, wanted, DIRECTORY), strict=True):
        runs[method].append(records)
    save_comparison(runs, COMPARED, OUT / "ppo.png")
    numbers = {
        method: {
            name: [[round(one[name], 3) for one in records] for records in of_seeds] for name in ("gold", "kl", "std")
        }
        for method, of_seeds in runs.items()
    }
    write_text_atomically(OUT / "ppo.json", json.dumps(numbers) + "\n")
    console = Console()
    show(console, runs)
    console.print(f"wrote {OUT}/ppo.png", highlight=False)


def run(directory: Path, method: str, seed: int, iterations: int = ITERATIONS) -> Records:
    """Trains proxies, and a policy against them; returns the metrics of each iteration.

    Args:
        directory: Folder with the model that policy, critic and proxies start from.
        method: A key of `METHODS`.
        seed: Random seed of preferences, proxies, samples and minibatches. Methods share the preferences of a seed.
        iterations: Number of iterations.
    """
    model = str(directory / "model")
    count, pessimism = METHODS[method]
    rng = np.random.default_rng(seed)
    units = make_preferences(model, PREFERENCES + VALIDATION, rng)
    train, held_out = units[:PREFERENCES], units[PREFERENCES:]
    samples = (
        [train]
        if count == 1
        else [[train[row] for row in rng.integers(0, len(train), len(train))] for _ in range(count)]
    )
    proxies = [train_proxy(model, sample, held_out, rng) for sample in samples]

    def rewards(
        prompts: Sequence[Sequence[int]], responses: Sequence[Response]
    ) -> tuple[NDArray[np.float32], dict[str, float]]:
        texts = [judged(one.ids) for one in responses]
        rewards_of, stds_of = zip(*(proxy_rewards(*proxy, texts) for proxy in proxies), strict=True)
        gold_S = [gold(one.ids) for one in responses]
        rewards_S = np.mean(rewards_of, axis=0) - pessimism * np.mean(stds_of, axis=0)
        return rewards_S.astype(np.float32), {"gold": float(np.mean(gold_S)), "std": float(np.mean(stds_of))}

    algorithm = ALGORITHM.model_copy(update={"seed": seed, "iterations": iterations})
    return tiny_ppo.train(model, Task(lambda _: [PROMPT] * PROMPTS, rewards, RESPONSE_TOKENS), algorithm)


def gold(response: TokenIds) -> float:
    """Returns the gold reward of the token ids of a response: different good words, minus a quarter for other words."""
    words = [int(token) for token in response if token != EOS]
    different = len({token for token in words if FIRST_GOOD <= token < FIRST_GOOD + GOOD})
    return different - 0.25 * (len(words) - different)


def judged(response: TokenIds) -> TokenIds:
    """Returns the token ids that a proxy reads: prompt and response, with one EOS at the end."""
    return np.array([*PROMPT, *(token for token in response if token != EOS), EOS])


def make_preferences(model: str, count: int, rng: np.random.Generator) -> list[Unit]:
    """Samples pairs of texts from the initial policy; the better of each comes first, unless its label is wrong."""
    generator = TransformersGenerator(BodyConfig(path=model), load_tokenizer(model, "plain"), 1.0, torch.device("cpu"))
    # Twice as many as needed, because texts of equal gold reward make no preference.
    responses = generator.generate([PROMPT] * 4 * count, RESPONSE_TOKENS, seed=int(rng.integers(2**31)))
    units: list[Unit] = []
    for first, second in zip(responses[::2], responses[1::2], strict=True):
        difference = gold(first.ids) - gold(second.ids)
        if difference != 0 and len(units) < count:
            is_right = (difference > 0) != (rng.random() < LABEL_NOISE)
            better, worse = (first, second) if is_right else (second, first)
            units.append([judged(better.ids), judged(worse.ids)])
    return units


def train_proxy(
    model: str, train: Sequence[Unit], held_out: Sequence[Unit], rng: np.random.Generator
) -> tuple[Critic, HeadPosterior]:
    """Trains a critic on preferences, keeps the step of the lowest held-out log-loss, and fits its posterior."""
    torch.manual_seed(int(rng.integers(2**31)))
    critic = create_critic_model(model, load_tokenizer(model, "plain"), None, disable_dropout=True)
    optimizer = torch.optim.AdamW(critic.parameters(), lr=PROXY_RATE, weight_decay=0.01)

    def log_loss(units: Sequence[Unit]) -> torch.Tensor:
        rewards_P2 = critic.rewards(critic.batch_of([ids for unit in units for ids in unit])).view(-1, 2)
        return torch.nn.functional.softplus(rewards_P2[:, 1] - rewards_P2[:, 0]).mean()

    best, weights = float("inf"), {}
    for _ in range(PROXY_STEPS):
        with torch.no_grad():
            held_out_loss = float(log_loss(held_out))
        if held_out_loss < best:
            best, weights = held_out_loss, {name: tensor.clone() for name, tensor in critic.state_dict().items()}
        optimizer.zero_grad()
        log_loss([train[row] for row in rng.integers(0, len(train), PROXY_BATCH)]).backward()
        optimizer.step()
    critic.load_state_dict(weights)
    posterior, _ = fit_head_posterior(train, held_out, last_states_of(critic.eval(), TOKEN_BUDGET))
    return critic, posterior


def proxy_rewards(
    critic: Critic, posterior: HeadPosterior, texts: Sequence[TokenIds]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Returns the rewards of texts and their standard deviations, fp32 ``[S]`` each."""
    rewards_S, states_SD = rewards_and_states(critic, texts, TOKEN_BUDGET)
    return rewards_S, posterior.stds(states_SD).numpy()


def show(console: Console, runs: Mapping[str, Sequence[Records]]) -> None:
    """Prints the gold reward of all runs over time, and the KL divergence at the end."""
    table = Table(title="Gold reward by iteration, mean ± standard error of three seeds", title_justify="left")
    for column in ("reward", *map(str, SHOWN), "highest", "last KL"):
        table.add_column(column, justify="left" if column == "reward" else "right")
    for method, of_seeds in runs.items():
        gold_SI = np.array([[one["gold"] for one in records] for records in of_seeds])
        columns = [*(gold_SI[:, number - 1] for number in SHOWN), gold_SI.max(axis=1)]
        cells = [f"{one.mean():.2f} ± {one.std(ddof=1) / np.sqrt(len(one)):.2f}" for one in columns]
        table.add_row(method, *cells, f"{np.mean([records[-1]['kl'] for records in of_seeds]):.1f}")
    console.print(table)


if __name__ == "__main__":
    run_job(main)
