"""Report of an evaluation or of data: figures with explanations, ``metrics.json`` and one self-contained HTML page.

The page contains its style and plots, loads nothing from a server and runs no script. Jinja escapes every text. The
plots are not escaped and hold no text from data. Knows nothing about models.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import jinja2

from rlhf_critic.errors import ConfigError
from rlhf_critic.evaluation.best_of_n import BestOfNEvaluation
from rlhf_critic.evaluation.bootstrap import BootstrapEstimate
from rlhf_critic.evaluation.calibration import Calibration
from rlhf_critic.evaluation.pointwise import PointwiseEvaluation
from rlhf_critic.evaluation.preferences import Evaluation
from rlhf_critic.files import write_text_atomically

REPORT_JSON = "metrics.json"
PAGE_NAME = "report.html"
MAX_WRONG_EXAMPLES = 8
MAX_CHARACTERS = 4000  # of one text


@dataclass(frozen=True)
class Figure:
    """A number formatted for people, with its interval (or the reason why there is none), label and meaning."""

    name: str
    value: str
    meaning: str


@dataclass(frozen=True)
class Bar:
    """Accuracy of a subset, and a baseline that ignores the texts."""

    name: str
    count: int
    accuracy: BootstrapEstimate
    baseline: float


@dataclass(frozen=True)
class Plot:
    """An inline SVG with title and caption. The SVG must hold no text from data."""

    title: str
    caption: str
    svg: str


@dataclass(frozen=True)
class HighlightedText:
    """A text in pieces: pairs of a text and whether it is a special token, because text may look like one."""

    label: str
    pieces: tuple[tuple[str, bool], ...]


@dataclass(frozen=True)
class HighlightedExample:
    """A row (``file:line``): a note, such as the critic's error, the texts' shared prefix and their rests."""

    origin: str
    note: str
    shared: HighlightedText
    texts: tuple[HighlightedText, ...]


@dataclass(frozen=True)
class Section:
    """A further table of a report.

    Attributes:
        name: Key of its data in ``metrics.json``.
        title: Heading.
        note: A sentence below the heading.
        columns: Headings of the columns.
        rows: Cells, as many as columns.
        data: The figures, as plain values for JSON.
    """

    name: str
    title: str
    note: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    data: Mapping[str, Any]


@dataclass(frozen=True)
class Page:
    """Content of the page. The first three figures are shown large; without bars, their section is omitted."""

    title: str
    source: str
    figures: Sequence[Figure]
    plots: Sequence[Plot]
    examples: Sequence[HighlightedExample]
    examples_title: str = "Largest errors"
    examples_note: str = "Rows with the largest errors, as the critic read them"
    baseline_name: str = ""
    bars: Sequence[Bar] = ()
    sections: Sequence[Section] = ()


def preference_figures(evaluation: Evaluation) -> list[Figure]:
    """Returns the figures of an evaluation on preferences."""
    shorter = evaluation.accuracy_where_shorter_wins
    controlled = evaluation.length_controlled_accuracy
    return [
        Figure("accuracy", str(evaluation.accuracy), "chosen side has the higher reward; ties count half, chance 0.5"),
        Figure("longer text wins", str(evaluation.length_baseline), "accuracy of preferring the longer text"),
        Figure(
            "accuracy, length-controlled",
            str(controlled or "cannot be estimated"),
            "if both sides were equally long; preferring the longer text gives 0.5",
        ),
        Figure("accuracy, shorter wins", str(shorter or "no such preference"), "pairs whose chosen side is shorter"),
        Figure("log-loss", str(evaluation.log_loss), "nats; chance gives 0.693"),
        Figure("margin", str(evaluation.margin), "mean of chosen minus rejected reward"),
        *calibration_figures(evaluation.calibration),
        Figure("rewards", f"{evaluation.reward_mean:.3f} ± {evaluation.reward_std:.3f}", "mean and standard deviation"),
        Figure("preferences", str(evaluation.preferences), "number of evaluated pairs"),
    ]


def pointwise_figures(evaluation: PointwiseEvaluation) -> list[Figure]:
    """Returns the figures of pointwise rows, those of steps first, then those of labels and of ratings."""
    equal = "all targets are equal"
    figures = []
    if steps := evaluation.steps:
        none = "needs rows with and without a wrong step"
        figures += [
            Figure("first wrong step, F1", str(steps.first_wrong_f1 or none), "as ProcessBench scores it; threshold 0"),
            Figure("first wrong step found", str(steps.first_wrong_found or none), "of rows with a wrong step"),
            Figure("no wrong step found", str(steps.correct_found or none), "of rows without a wrong step"),
            Figure("accuracy of steps", str(steps.accuracy), f"value above 0 for a correct step; {steps.steps} steps"),
            Figure("AUC of steps", str(steps.auc or equal), "a correct step has the higher value; chance 0.5"),
            *calibration_figures(steps.calibration, "value"),
        ]
    if label := evaluation.label:
        figures += [
            Figure("AUC", str(label.auc or equal), "a true label has the higher reward; chance 0.5"),
            Figure(
                "accuracy of labels", str(label.accuracy), f"reward above 0; {label.positive:.3f} of labels are true"
            ),
            Figure("log-loss of labels", str(label.log_loss), "nats; a reward of 0 gives 0.693"),
            *calibration_figures(label.calibration, "reward"),
        ]
    if score := evaluation.score:
        figures += [
            Figure("Spearman correlation", str(score.spearman or equal), "of the ranks of rewards and ratings"),
            Figure("Pearson correlation", str(score.pearson or equal), "of rewards and ratings"),
            Figure("squared error", str(score.squared_error), "of rewards against ratings"),
        ]
    return [
        *figures,
        Figure("rewards", f"{evaluation.reward_mean:.3f} ± {evaluation.reward_std:.3f}", "mean and standard deviation"),
        Figure("rows with targets", str(evaluation.rows), "number of evaluated responses"),
    ]


def calibration_figures(calibration: Calibration, what: str = "margin") -> list[Figure]:
    """Returns the calibration figures, raw and temperature-scaled. ``what`` names the log-odds."""
    raw, scaled = calibration.raw, calibration.scaled
    figures = [
        Figure(
            "calibration error",
            f"{raw.error:.3f}",
            f"of sigmoid({what}); a perfectly calibrated critic has {raw.error_by_chance:.3f} by chance",
        )
    ]
    if calibration.temperature is None or scaled is None:
        return [*figures, Figure("temperature", "none", "no finite positive temperature is optimal for this data")]
    confidence = "overconfident" if calibration.temperature > 1 else "underconfident"
    return [
        *figures,
        Figure(
            "temperature",
            f"{calibration.temperature:.3f}",
            f"best for this data; ideal 1, this critic is {confidence}. Scaled log-loss: {scaled.log_loss:.3f}",
        ),
        Figure(
            "calibration error, scaled",
            f"{scaled.error:.3f}",
            f"of sigmoid({what} / temperature); {scaled.error_by_chance:.3f} by chance",
        ),
    ]


def best_of_n_figures(evaluation: BestOfNEvaluation) -> list[Figure]:
    """Returns the figures of a best-of-n evaluation."""
    figures = [
        Figure("accuracy", str(evaluation.accuracy), "highest reward to a correct response; ties share the credit"),
        Figure("chance", f"{evaluation.chance:.3f}", "accuracy of random rewards"),
    ]
    if evaluation.all_right_above_wrong is not None:
        several = str(evaluation.all_right_above_wrong)
        figures.append(
            Figure("all correct above all wrong", several, "share of the rows with several correct responses")
        )
    if evaluation.ties is not None:
        ties = evaluation.ties
        parts = (
            f"{ties.pairs} pairs; accuracy: tied {ties.tied_accuracy:.3f}, reference {ties.ref_accuracy:.3f}; gap "
            f"above spread: tied {ties.preferred:.3f}, both {ties.preferred_hard:.3f}"
        )
        figures.append(Figure("RewardBench 2 ties score", str(ties.score), parts))
    return [
        *figures,
        Figure("rewards", f"{evaluation.reward_mean:.3f} ± {evaluation.reward_std:.3f}", "mean and standard deviation"),
        Figure("rows", str(evaluation.rows), f"with {evaluation.responses:.1f} responses on average"),
    ]


def highlighted_example(
    origin: str, note: str, texts: Mapping[str, str], special_tokens: Sequence[str]
) -> HighlightedExample:
    """Splits decoded texts, by heading and with special tokens, into their shared prefix and the rest of each."""
    same = takewhile(lambda characters: len(set(characters)) == 1, zip(*texts.values(), strict=False))
    shared = "".join(characters[0] for characters in same)
    # Ends the prefix at white space, so no word is split.
    shared = shared[: max(shared.rfind(space) for space in " \n") + 1]
    rests = tuple(_in_pieces(label, text[len(shared) :], special_tokens) for label, text in texts.items())
    return HighlightedExample(origin, note, _in_pieces("shared prefix", shared, special_tokens), rests)


def _in_pieces(label: str, text: str, special_tokens: Sequence[str]) -> HighlightedText:
    if len(text) > MAX_CHARACTERS:
        half = MAX_CHARACTERS // 2
        text = f"{text[:half]}\n[... {len(text) - 2 * half} characters omitted ...]\n{text[-half:]}"
    if not special_tokens:
        return HighlightedText(label, ((text, False),))
    longest_first = sorted(special_tokens, key=len, reverse=True)
    pieces = re.split(f"({'|'.join(map(re.escape, longest_first))})", text)
    return HighlightedText(label, tuple((piece, index % 2 == 1) for index, piece in enumerate(pieces) if piece))


def validate_report_directory(directory: str) -> None:
    """Checks that a report can be written to a directory and creates it.

    Raises:
        ConfigError: The directory is not empty, is not a directory, or cannot be created.
    """
    path = Path(directory)
    try:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise ConfigError(f"report: {directory} is not an empty directory; give a new one, or empty it first")
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(directory, error) from error


def write_report(directory: str, metrics: Mapping[str, Any], page: Page) -> None:
    """Writes ``metrics.json`` and ``report.html``, each atomically.

    Raises:
        ConfigError: See `validate_report_directory`. Or the disk is full.
    """
    validate_report_directory(directory)
    try:
        write_text_atomically(Path(directory) / REPORT_JSON, json.dumps(metrics, indent=2, allow_nan=False) + "\n")
        write_text_atomically(Path(directory) / PAGE_NAME, render(page))
    except OSError as error:
        raise _cannot_write(directory, error) from error


def render(page: Page) -> str:
    """Renders the page as HTML."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # Replaces lone surrogates, which JSON may hold and UTF-8 cannot encode.
    return environment.get_template("report.html.j2").render(page=page).encode("utf-8", "replace").decode("utf-8")


def _cannot_write(directory: str, error: OSError) -> ConfigError:
    return ConfigError(f"report: {directory} cannot be written ({error}); free space or give another directory")
