"""``make critic-demo``: PPO with a critic against the baseline of a group, where one early word decides the reward.

A prompt names a key among filler words. The first word of the response decides the reward: 1 if it is an answer to the
key, otherwise 0. The rest of the response, up to 63 words, changes nothing. A baseline for the whole response cannot
tell which word earned the reward. A critic can: after the first word it knows the reward.

A lambda below 1 hides the reward from the first word until the critic knows it, so one of 0.95 is compared too.
Each run is one process, without Ray, and finished runs are kept, so the command can be interrupted.

Shape legend: S seeds, I iterations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from jobs.cli import run_job
from jobs.demos import tiny_ppo
from jobs.demos.tiny_ppo import SAMPLES, SPECIAL_WORDS, Records, Task
from rlhf_critic.config.ppo import AlgorithmConfig
from rlhf_critic.evaluation.plots import save_comparison
from rlhf_critic.model.generation import Response

KEYS, SYNONYMS, FILLER = 2, 4, 16
ITERATIONS, PROMPTS, RESPONSE_TOKENS = 40, 16, 64
WORDS = [
    *(f"key{number}" for number in range(KEYS)),
    *(f"answer{number}" for number in range(KEYS * SYNONYMS)),
    *(f"word{number}" for number in range(FILLER)),
]
TOKEN = {word: number + len(SPECIAL_WORDS) for number, word in enumerate(WORDS)}
DIRECTORY = Path("runs/critic-demo")
PLOT_NAME = "curves.png"
SEEDS = (3, 4, 5)  # the settings were chosen with others
# The first iterations of a critic train only the critic, and count as the others do.
CRITIC = AlgorithmConfig(
    iterations=ITERATIONS,
    critic_epochs=6,
    critic_lambda=1.0,
    gae_lambda=1.0,
    kl_coefficient=0.0,
    value_warmup_iterations=2,
)
METHODS = {
    "critic": CRITIC,
    "critic, lambda 0.95": CRITIC.model_copy(update={"gae_lambda": 0.95}),
    "RLOO, groups of 8": CRITIC.model_copy(update={"baseline": "rloo", "value_warmup_iterations": 0}),
}
COMPARED = {"reward": "mean reward", "explained_variance": "explained variance of returns"}
VARIED = (0.1, 0.9)  # mean rewards between which returns vary enough to be explained


def main() -> None:
    """Makes all runs, draws their curves and prints the result."""
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    tiny_ppo.save_model(DIRECTORY / "model", WORDS)
    wanted = [(method, seed) for seed in SEEDS for method in METHODS]
    runs: dict[str, list[Records]] = {method: [] for method in METHODS}
    for (method, _), records in zip(wanted, tiny_ppo.run_all(run, wanted, DIRECTORY), strict=True):
        runs[method].append(records)
    save_comparison(runs, COMPARED, DIRECTORY / PLOT_NAME)
    show(Console(), runs)


def run(directory: Path, method: str, seed: int, iterations: int = ITERATIONS) -> Records:
    """Makes one run with the model in a directory and returns the metrics of each iteration."""
    algorithm = METHODS[method].model_copy(update={"seed": seed, "iterations": iterations})
    return tiny_ppo.train(str(directory / "model"), Task(make_prompts, rewards, RESPONSE_TOKENS), algorithm)


def explained(records: Records) -> float:
    """Returns a run's mean explained variance over the iterations whose rewards vary; NaN if none does."""
    low, high = VARIED
    shares = [one["explained_variance"] for one in records if low <= one["reward"] <= high]
    return float(np.mean(shares)) if shares else float("nan")


def show(console: Console, runs: Mapping[str, Sequence[Records]]) -> None:
    """Prints the rewards of all runs, and what the critic explains."""
    table = Table(title=f"Mean reward of three seeds, {PROMPTS * SAMPLES} rollouts an iteration", title_justify="left")
    for column in ("method", "all iterations", f"last 10 of {ITERATIONS}", "iterations to 0.8", "explained variance"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for method, of_seeds in runs.items():
        reward_SI = np.array([[one["reward"] for one in records] for records in of_seeds])
        reached = [int(np.argmax(row >= 0.8)) + 1 if (row >= 0.8).any() else None for row in reward_SI]
        critic = METHODS[method].baseline == "critic"
        shares = f"{np.mean([explained(records) for records in of_seeds]):.2f}" if critic else "-"
        cells = [f"{part.mean():.3f} ± {part.mean(1).std(ddof=1):.3f}" for part in (reward_SI, reward_SI[:, -10:])]
        table.add_row(method, *cells, ", ".join(map(str, reached)), shares)
    console.print(table)
    console.print(f"curves: {DIRECTORY / PLOT_NAME}", highlight=False, soft_wrap=True)


def make_prompts(rng: np.random.Generator) -> list[list[int]]:
    """Makes the prompts of an iteration: a key among three filler words."""
    prompts = []
    for _ in range(PROMPTS):
        words = [TOKEN[f"word{number}"] for number in rng.integers(0, FILLER, 3)]
        words.insert(int(rng.integers(0, 4)), TOKEN[f"key{rng.integers(0, KEYS)}"])
        prompts.append(words)
    return prompts


def rewards(
    prompts: Sequence[Sequence[int]], responses: Sequence[Response]
) -> tuple[NDArray[np.float32], dict[str, float]]:
    """Rewards each response with 1 if its first word answers the key of the prompt, otherwise with 0."""
    rewarded = []
    for prompt, response in zip(prompts, responses, strict=True):
        key = next(token for token in prompt if TOKEN["key0"] <= token < TOKEN["key0"] + KEYS)
        first = TOKEN["answer0"] + SYNONYMS * (key - TOKEN["key0"])
        rewarded.append(first <= response.ids[0] < first + SYNONYMS)
    return np.array(rewarded, dtype=np.float32), {}


if __name__ == "__main__":
    run_job(main)
