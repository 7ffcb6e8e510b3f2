"""The report of an evaluation: its figures in words, ``metrics.json`` and one self-contained HTML page.

The page brings its own style and plots, asks nothing of any server and runs no script. Jinja escapes every text, and
the plots, which are not escaped, hold no text from data. Knows nothing of models.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from rlhf_critic.errors import ConfigError
from rlhf_critic.evaluation.best_of_n import BestOfNEvaluation
from rlhf_critic.evaluation.bootstrap import BootstrapEstimate
from rlhf_critic.evaluation.calibration import Calibration
from rlhf_critic.evaluation.preferences import Evaluation
from rlhf_critic.files import write_text_atomically

REPORT_JSON = "metrics.json"
PAGE_NAME = "report.html"
MOST_WRONG = 8  # preferences shown as text
MOST_CHARACTERS = 4000  # of one text


@dataclass(frozen=True)
class Figure:
    """A measure as people read it.

    Attributes:
        name: What is measured.
        value: The number with its interval, or why there is none.
        meaning: What it is, and what to hold it against.
    """

    name: str
    value: str
    meaning: str


@dataclass(frozen=True)
class Bar:
    """The accuracy of a subset, beside what would be reached without reading."""

    name: str
    count: int
    accuracy: BootstrapEstimate
    baseline: float


@dataclass(frozen=True)
class Plot:
    """An inline SVG with what it shows; the SVG must hold no text from data."""

    title: str
    caption: str
    svg: str


@dataclass(frozen=True)
class HighlightedText:
    """A text in pieces, with special tokens told apart from text that looks like them.

    Attributes:
        label: Whose it is.
        pieces: Texts, each with whether it is a special token.
    """

    label: str
    pieces: tuple[tuple[str, bool], ...]


@dataclass(frozen=True)
class WrongExample:
    """A judgement that the critic missed.

    Attributes:
        origin: Where it comes from, as ``file:line``.
        note: By how much it was missed.
        shared: What the texts begin with.
        texts: How each goes on.
    """

    origin: str
    note: str
    shared: HighlightedText
    texts: tuple[HighlightedText, ...]


@dataclass(frozen=True)
class Page:
    """Everything on the page.

    Attributes:
        critic: Which critic was evaluated.
        source: What was read.
        figures: The first is shown large.
        baseline_name: What the baseline of the bars is.
        bars: Accuracy by subset; none hides the section.
        plots: In their order.
        wrong: The worst first.
    """

    critic: str
    source: str
    figures: Sequence[Figure]
    baseline_name: str
    bars: Sequence[Bar]
    plots: Sequence[Plot]
    wrong: Sequence[WrongExample]


def preference_figures(evaluation: Evaluation) -> list[Figure]:
    """The figures of an evaluation on preferences."""
    shorter = evaluation.accuracy_where_shorter_wins
    controlled = evaluation.length_controlled_accuracy
    return [
        Figure("accuracy", str(evaluation.accuracy), "chosen side scored higher; a tie counts half, a coin has 0.5"),
        Figure("longer text wins", str(evaluation.length_baseline), "what counting tokens alone would reach"),
        Figure(
            "accuracy, length-controlled",
            str(controlled or "cannot be told from the rest"),
            "if both sides were equally long; counting tokens has 0.5",
        ),
        Figure("accuracy, shorter wins", str(shorter or "no such preference"), "where length is no help"),
        Figure("log-loss", str(evaluation.log_loss), "nats; a coin has 0.693"),
        Figure("margin", str(evaluation.margin), "mean of chosen minus rejected reward"),
        *calibration_figures(evaluation.calibration),
        Figure("rewards", f"{evaluation.reward_mean:.3f} ± {evaluation.reward_std:.3f}", "mean and standard deviation"),
        Figure("preferences", str(evaluation.preferences), "judged"),
    ]


def calibration_figures(calibration: Calibration) -> list[Figure]:
    """Calibration as it is and with the temperature."""
    raw, scaled = calibration.raw, calibration.scaled
    figures = [
        Figure(
            "calibration error",
            f"{raw.error:.3f}",
            f"of sigmoid(margin); perfectly calibrated, luck alone shows {raw.error_by_chance:.3f}",
        )
    ]
    if calibration.temperature is None or scaled is None:
        return [*figures, Figure("temperature", "none", "no temperature makes these preferences the most likely")]
    sure = "too sure of itself" if calibration.temperature > 1 else "not sure enough"
    return [
        *figures,
        Figure(
            "temperature",
            f"{calibration.temperature:.3f}",
            f"fitted here; 1 fits already, this critic is {sure}. Log-loss with it: {scaled.log_loss:.3f}",
        ),
        Figure(
            "calibration error, with it",
            f"{scaled.error:.3f}",
            f"of sigmoid(margin / temperature); luck alone shows {scaled.error_by_chance:.3f}",
        ),
    ]


def best_of_n_figures(evaluation: BestOfNEvaluation) -> list[Figure]:
    """The figures of an evaluation on best-of-n rows."""
    figures = [
        Figure("accuracy", str(evaluation.accuracy), "highest reward to a right response; ties share the credit"),
        Figure("chance", f"{evaluation.chance:.3f}", "what rewards drawn at random would reach"),
    ]
    if evaluation.all_right_above_wrong is not None:
        figures.append(
            Figure(
                "all right above all wrong",
                str(evaluation.all_right_above_wrong),
                "of rows with several right responses",
            )
        )
    if evaluation.ties is not None:
        ties = evaluation.ties
        figures.append(
            Figure(
                "RewardBench 2 ties score",
                str(ties.score),
                f"{ties.pairs} pairs; accuracy tied {ties.tied_accuracy:.3f}, reference {ties.ref_accuracy:.3f}; gap "
                f"above spread {ties.preferred:.3f}, in both {ties.preferred_hard:.3f}",
            )
        )
    return [
        *figures,
        Figure("rewards", f"{evaluation.reward_mean:.3f} ± {evaluation.reward_std:.3f}", "mean and standard deviation"),
        Figure("rows", str(evaluation.rows), f"judged, of {evaluation.responses:.1f} responses on average"),
    ]


def wrong_example(origin: str, note: str, texts: Mapping[str, str], special_tokens: Sequence[str]) -> WrongExample:
    """Takes decoded texts apart into what they share at their beginning and how each goes on.

    Args:
        origin: Where it comes from.
        note: By how much it was missed.
        texts: Whose text it is, and the text, special tokens included.
        special_tokens: The tokenizer's.
    """
    length = next(
        (n for n, characters in enumerate(zip(*texts.values(), strict=False)) if len(set(characters)) > 1),
        min(map(len, texts.values())),
    )
    shared = next(iter(texts.values()))[:length]
    # Back to a space, so that no word is cut in two.
    shared = shared[: max(shared.rfind(space) for space in " \n") + 1]
    return WrongExample(
        origin=origin,
        note=note,
        shared=_in_pieces("both begin", shared, special_tokens),
        texts=tuple(_in_pieces(label, text[len(shared) :], special_tokens) for label, text in texts.items()),
    )


def _in_pieces(label: str, text: str, special_tokens: Sequence[str]) -> HighlightedText:
    if len(text) > MOST_CHARACTERS:
        half = MOST_CHARACTERS // 2
        text = f"{text[:half]}\n[... {len(text) - 2 * half} characters left out ...]\n{text[-half:]}"
    if not special_tokens:
        return HighlightedText(label, ((text, False),))
    longest_first = sorted(special_tokens, key=len, reverse=True)
    pieces = re.split(f"({'|'.join(map(re.escape, longest_first))})", text)
    return HighlightedText(label, tuple((piece, index % 2 == 1) for index, piece in enumerate(pieces) if piece))


def validate_report_directory(directory: str) -> None:
    """Checks that a report can go to a directory, before work is spent on it.

    Raises:
        ConfigError: There are files in it, it is no directory, or it cannot be made.
    """
    path = Path(directory)
    try:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise ConfigError(f"report: {directory} is not an empty directory; give a new one, or empty it first")
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(directory, error) from error


def write_report(directory: str, metrics: Mapping[str, Any], page: Page) -> None:
    """Writes ``metrics.json`` and ``report.html``, each whole or not at all.

    Raises:
        ConfigError: See `validate_report_directory`; or the disk is full.
    """
    validate_report_directory(directory)
    try:
        write_text_atomically(Path(directory) / REPORT_JSON, json.dumps(metrics, indent=2, allow_nan=False) + "\n")
        write_text_atomically(Path(directory) / PAGE_NAME, render(page))
    except OSError as error:
        raise _cannot_write(directory, error) from error


def render(page: Page) -> str:
    """The HTML."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # A lone surrogate, which JSON may hold, has no UTF-8.
    return environment.get_template("report.html.j2").render(page=page).encode("utf-8", "replace").decode("utf-8")


def _cannot_write(directory: str, error: OSError) -> ConfigError:
    return ConfigError(f"report: {directory} cannot be written ({error}); free some space, or give another directory")
