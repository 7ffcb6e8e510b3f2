"""``make quickstart``: trains a critic on human ratings and scores texts with it in plain transformers.

Complete parts are kept and incomplete ones are made again, so the command can be interrupted; running it again resumes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import ray
from rich.console import Console
from rich.table import Column, Table

from actors.runtime.storage import resolve_run, run_exists
from jobs.cli import run_job
from jobs.quickstart_data import QuickstartError, download_model, download_preferences
from jobs.train import checkpoint_of, train
from rlhf_critic.checkpoint.critic_directory import CriticCard, load_critic, read_card
from rlhf_critic.checkpoint.export import export_critic
from rlhf_critic.config.base import load_config_file, shown_path
from rlhf_critic.config.train import TrainJobConfig
from rlhf_critic.scoring.local import score_sequences

CONFIG = Path(__file__).with_name("quickstart.yaml")
PLAIN_TIMEOUT_S = 300
TEXTS = (
    "What a wonderful film, I laughed and cried and would see it again tomorrow.",
    "A decent film with a few good scenes.",
    "The film is two hours long.",
    "The plot is thin and the jokes are tired.",
    "A dull, ugly, insulting waste of an evening.",
    "My new phone arrived early and the screen is gorgeous!",
    "The phone stopped working after a day and nobody answers my mails.",
)


def main() -> None:
    """Downloads model and data, trains, exports and prints the result."""
    console = Console()
    config = load_config_file(TrainJobConfig, str(CONFIG))
    export = Path(config.run.storage_path) / f"{config.run.name}-critic"
    download_model(Path(config.model.path))
    download_preferences(Path(config.data.train[0]), Path(config.data.validation[0]))
    if not export.exists():
        resume = run_exists(*resolve_run(config.run.storage_path, config.run.name))
        result = train(config.model_copy(update={"resume": resume}))
        export_critic(checkpoint_of(config, result), export, auto_map=False)
        ray.shutdown()
    show(console, export)


def show(console: Console, export: Path) -> None:
    """Scores a few texts in a process of plain transformers, and prints them with the accuracy."""
    card = read_card(export)
    plain = plain_scores(export)
    loaded = load_critic(export)
    sequences = [encoded.ids for encoded in loaded.encoder.encode_batch([("", text) for text in TEXTS])]
    here = score_sequences(loaded.critic, sequences, token_budget=4096)
    title = "Scored by plain transformers in a separate process"
    table = Table(Column("score", justify="right"), "text", title=title, title_justify="left")
    for score, text in sorted(zip(plain, TEXTS, strict=True), reverse=True):
        table.add_row(f"{score:+.3f}", text)
    console.print(table)
    difference = max(abs(a - b) for a, b in zip(plain, here.tolist(), strict=True))
    console.print(f"largest difference from the score computed by this project: {difference:.1e}")
    console.print(summary(card))
    shown = shown_path(str(export))
    console.print(f"the critic is in [bold]{shown}[/bold]; next, try it on your own preferences:", soft_wrap=True)
    console.print(f"  .venv/bin/rlhf-critic evaluate {shown} YOUR_PREFERENCES.jsonl", highlight=False, soft_wrap=True)


def plain_scores(export: Path) -> list[float]:
    """Computes the rewards of `TEXTS` with plain transformers.

    Raises:
        QuickstartError: The process failed or took too long.
    """
    script = Path(__file__).parent / "examples" / "score_with_transformers.py"
    try:
        finished = subprocess.run(
            # -I keeps this folder and the environment off the path of that process.
            [sys.executable, "-I", str(script), str(export.resolve())],
            input=json.dumps([["", text] for text in TEXTS]),
            capture_output=True,
            text=True,
            timeout=PLAIN_TIMEOUT_S,
            check=True,
        )
    except subprocess.CalledProcessError as error:
        raise QuickstartError(f"plain transformers could not score the export:\n{error.stderr}") from error
    except subprocess.TimeoutExpired as error:
        raise QuickstartError(f"plain transformers did not score {len(TEXTS)} texts in {PLAIN_TIMEOUT_S} s") from error
    return list(json.loads(finished.stdout.splitlines()[-1]))


def summary(card: CriticCard) -> str:
    """Formats the accuracy on held-out preferences, with its length baseline."""
    evaluation = card.training["evaluation"]

    def interval(name: str) -> str:
        figure = evaluation[name]
        return f"{figure['mean']:.3f} (95% interval {figure['low']:.3f} to {figure['high']:.3f})"

    return (
        f"accuracy on {evaluation['preferences']} held-out preferences: {interval('accuracy')}\n"
        f"always preferring the longer text:        {interval('length_baseline')}"
    )


if __name__ == "__main__":
    run_job(main)
