"""Plots of an evaluation as inline SVG with the colours of the page, and of a PPO run as a PNG file.

The colours given to matplotlib are placeholders. In SVG they become CSS variables, so one drawing suits light and dark
pages. In PNG they become the colours of `PRINTED`. Knows only numbers.

Shape legend: P preferences, S responses.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.ticker
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from rlhf_critic.evaluation.bootstrap import FloatArray
from rlhf_critic.evaluation.calibration import Reliability

INK, MUTED, GRID, FIRST, SECOND, PAPER = "#010203", "#010204", "#010205", "#010206", "#010207", "#010208"
VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", FIRST: "first", SECOND: "second", PAPER: "paper"}
STYLE = {
    "svg.hashsalt": "rlhf_critic",  # makes ids the same in every run
    "svg.fonttype": "none",  # keeps text selectable, searchable and in the font of the page
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "legend.fontsize": 10,
}
MAX_POINTS = 1500  # of a scatter plot; more points would hide each other and enlarge the page
TREND_BINS = 12  # ranges of length with equal numbers of responses


@mpl.rc_context(STYLE)
def reliability_svg(raw: Reliability, scaled: Reliability | None) -> str:
    """Draws how often the preferred side was chosen, by confidence. The diagonal is perfect calibration."""
    figure, axes = _figure("confidence in the preferred side", "share in which it was chosen")
    axes.plot([0.5, 1], [0.5, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 3)), label="perfect calibration")
    for colour, label, one in ((FIRST, "raw", raw), (SECOND, "temperature-scaled", scaled)):
        if one is not None:
            largest = max(a_bin.preferences for a_bin in one.bins)
            confidences, accuracies = ([getattr(b, name) for b in one.bins] for name in ("confidence", "accuracy"))
            axes.plot(confidences, accuracies, color=colour, linewidth=1.6, label=label)
            sizes = [12 + 100 * a_bin.preferences / largest for a_bin in one.bins]
            axes.scatter(confidences, accuracies, sizes, color=colour, alpha=0.75, linewidths=0, zorder=3)
    axes.set_xlim(0.49, 1.01)
    axes.set_ylim(-0.03, 1.03)
    axes.legend(loc="lower right")
    return _inline(figure)


@mpl.rc_context(STYLE)
def histogram_svg(values_P: FloatArray, label: str) -> str:
    """Draws a histogram of differences. Negative differences are errors of the critic."""
    figure, axes = _figure(label, "count")
    width = max(np.ptp(np.append(values_P, 0.0)) / 40, np.finfo(np.float64).tiny)
    # Zero is an edge, so no bar mixes correct and wrong.
    first, last = np.floor(values_P.min() / width), np.floor(values_P.max() / width) + 1
    edges = (np.arange(first, last + 1) * width).tolist()
    axes.hist(values_P[values_P >= 0], edges, color=FIRST, label="correct")
    axes.hist(values_P[values_P < 0], edges, color=SECOND, label="wrong")
    axes.axvline(0, color=INK, linewidth=1)
    axes.legend(loc="best")
    return _inline(figure)


@mpl.rc_context(STYLE)
def length_svg(rewards_P2: FloatArray, lengths_P2: NDArray[np.int64]) -> str:
    """Draws the reward of responses against their length, and the median reward by length over both sides."""
    figure, axes = _figure("tokens of prompt and response (log scale)", "reward")
    shown = np.random.default_rng(0).permutation(len(rewards_P2))[: MAX_POINTS // 2]
    for side, colour, label in ((1, SECOND, "rejected"), (0, FIRST, "chosen")):
        axes.scatter(
            lengths_P2[shown, side], rewards_P2[shown, side], 9, color=colour, alpha=0.45, linewidths=0, label=label
        )
    order = lengths_P2.ravel().argsort(kind="stable")
    ranges = [part for part in np.array_split(order, TREND_BINS) if len(part)]
    trend = [(np.median(lengths_P2.ravel()[part]), np.median(rewards_P2.ravel()[part])) for part in ranges]
    axes.plot(*zip(*trend, strict=True), color=INK, linewidth=1.8, label="median")
    _log_tokens(axes)
    axes.legend(loc="best")
    return _inline(figure)


@mpl.rc_context(STYLE)
def lengths_svg(lengths_P2: NDArray[np.int64]) -> str:
    """Draws histograms of the lengths of preferred and other responses, in bins of equal width on a log scale."""
    figure, axes = _figure("tokens of prompt and response (log scale)", "comparisons")
    edges = np.geomspace(lengths_P2.min(), lengths_P2.max() + 1, 31).tolist()
    for side, colour, label in ((1, SECOND, "other"), (0, FIRST, "preferred")):
        axes.hist(lengths_P2[:, side], edges, color=colour, label=label, histtype="step", linewidth=1.8)
    _log_tokens(axes)
    axes.legend(loc="best")
    return _inline(figure)


def _log_tokens(axes: Axes) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(mpl.ticker.LogLocator(10, subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(mpl.ticker.FuncFormatter(lambda tokens, _: f"{tokens:g}"))
    axes.xaxis.set_minor_formatter(mpl.ticker.NullFormatter())


def _figure(x_label: str, y_label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.6, 3.7), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.tick_params(length=0)
    return figure, axes


def _inline(figure: Figure) -> str:
    """Returns only the ``<svg>`` element, without a fixed size and with the colours of the page."""
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = drawn.getvalue()
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg[svg.index("<svg") :], count=2)
    return re.sub("#01020[3-8]", lambda found: f"var(--{VARIABLES[found[0]]})", svg)


CURVES = (
    ("reward", "mean reward", "linear"),
    ("kl", "KL from the reference (nats)", "linear"),
    ("value_loss", "value loss", "log"),
    ("explained_variance", "explained variance of returns", "linear"),
    ("value_calibration_error", "calibration error of values", "linear"),
)
BY_POSITION = (("value_error", "value error (root mean square)"), ("advantage", "mean advantage"))
POSITIONS = ("first quarter of the response", "second", "third", "last")
PRINTED = {INK: "#1b1b1f", MUTED: "#5c5c66", GRID: "#d9d9e0", FIRST: "#1f6fb2", SECOND: "#c2571a", PAPER: "#ffffff"}
CALIBRATED = 5  # last iterations whose values the calibration plot shows


def save_curves(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws the curves of a PPO run to a PNG file, from the records of its ``metrics.jsonl``.

    Panels by iteration: those of `CURVES`, and value error and advantage by position in the response. The last panel
    has predicted against realised returns of the last iterations.
    """
    style = {name: PRINTED.get(value, value) if isinstance(value, str) else value for name, value in STYLE.items()}
    trained = [one for one in records if one["kind"] == "train"]
    with mpl.rc_context(style):
        figure = Figure(figsize=(17.6, 6.6), layout="constrained", facecolor=PRINTED[PAPER])
        *panels, last = figure.subplots(2, 4).flat
        for axes, (name, label, scale) in zip(panels, CURVES, strict=False):
            for kind, colour, marker in (("train", PRINTED[FIRST], None), ("validation", PRINTED[SECOND], "o")):
                points = _points([one for one in records if one["kind"] == kind], name)
                if points:
                    prompts = "held-out prompts" if kind == "validation" else "rollouts"
                    axes.plot(*zip(*points, strict=True), color=colour, marker=marker, linewidth=1.8, label=prompts)
            _finish(axes, "iteration", label)
            axes.set_yscale(scale)
            if len(axes.lines) > 1:
                axes.legend(loc="best")
        for axes, (name, label) in zip(panels[len(CURVES) :], BY_POSITION, strict=True):
            for number, position in enumerate(POSITIONS, 1):
                points = _points(trained, f"{name}_{number}")
                if points:
                    shade = 1.0 - 0.22 * (len(POSITIONS) - number)
                    axes.plot(*zip(*points, strict=True), color=PRINTED[FIRST], alpha=shade, label=position)
            _finish(axes, "iteration", label)
            if axes.lines:
                axes.legend(loc="best")
        _draw_calibration(last, trained[-CALIBRATED:])
        figure.savefig(path, dpi=110)


def _points(records: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    return [(one["step"], one[name]) for one in records if name in one]


def _finish(axes: Axes, x_label: str, y_label: str) -> None:
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.tick_params(length=0)
    if x_label == "iteration":
        axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))


def _draw_calibration(axes: Axes, records: Sequence[Mapping[str, Any]]) -> None:
    """Draws predicted against realised returns; on the diagonal they are equal."""
    points = [
        (one[name], one[name.replace("predicted", "realised")])
        for one in records
        for name in one
        if name.startswith("value_predicted_")
    ]
    if points:
        axes.scatter(*zip(*points, strict=True), color=PRINTED[FIRST], alpha=0.75, linewidths=0)
        ends = min(map(min, points)), max(map(max, points))
        axes.plot(ends, ends, color=PRINTED[MUTED], linewidth=1, linestyle=(0, (4, 3)), label="perfect calibration")
        axes.legend(loc="best")
    _finish(axes, "predicted return (value)", "realised return")


COLOURS = ("#1f6fb2", "#c2571a", "#3f8f4f", "#7a4fa3")


def save_comparison(
    runs: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]], compared: Mapping[str, str], path: Path
) -> None:
    """Draws metrics of several methods to a PNG file: one panel for each, with mean and range of the seeds.

    Args:
        runs: By method, the records of each seed's iterations.
        compared: Label of each metric.
        path: PNG file.
    """
    style = {name: PRINTED.get(value, value) if isinstance(value, str) else value for name, value in STYLE.items()}
    with mpl.rc_context(style):
        figure = Figure(figsize=(11.2, 4.2), layout="constrained", facecolor=PRINTED[PAPER])
        for axes, (metric, label) in zip(figure.subplots(1, len(compared)), compared.items(), strict=True):
            for colour, (method, of_seeds) in zip(COLOURS, runs.items(), strict=False):
                numbers = np.array([[one.get(metric, np.nan) for one in records] for records in of_seeds])
                if not np.nan_to_num(numbers).any():
                    continue
                steps = np.arange(1, numbers.shape[1] + 1)
                axes.plot(steps, numbers.mean(0), color=colour, linewidth=1.8, label=method)
                axes.fill_between(steps, numbers.min(0), numbers.max(0), color=colour, alpha=0.18, linewidth=0)
            _finish(axes, "iteration", label)
            if metric == "explained_variance":  # has no lower bound where returns are almost equal
                axes.set_ylim(bottom=max(axes.get_ylim()[0], -0.5))
            axes.legend(loc="best")
        figure.savefig(path, dpi=110)


def save_best_of_n_curves(numbers: Sequence[int], results: Mapping[str, Mapping[str, FloatArray]], path: Path) -> None:
    """Draws gold rewards of best-of-n to a PNG file: one panel for each setting, one line for each way to choose.

    Args:
        numbers: Numbers of texts to choose from.
        results: Gold rewards ``[seeds, numbers]`` of each way, by setting. The band is the standard error.
        path: The file.
    """
    style = {name: PRINTED.get(value, value) if isinstance(value, str) else value for name, value in STYLE.items()}
    kl = np.log(numbers) - (np.array(numbers) - 1) / np.array(numbers)
    with mpl.rc_context(style):
        figure = Figure(figsize=(10.4, 4.4), layout="constrained", facecolor=PRINTED[PAPER])
        panels = figure.subplots(1, len(results), sharey=True, squeeze=False).flat
        for axes, (setting, ways) in zip(panels, results.items(), strict=True):
            for way, gold in ways.items():
                mean, error = gold.mean(axis=0), gold.std(axis=0, ddof=1) / np.sqrt(len(gold))
                (line,) = axes.plot(kl, mean, linewidth=1.8, marker="o", markersize=3, label=way)
                axes.fill_between(kl, mean - error, mean + error, color=line.get_color(), alpha=0.15, linewidth=0)
            axes.set_title(setting, fontsize=11)
            axes.set_xlabel("KL of best-of-n from the pool (nats)")
            axes.set_ylabel("gold reward (mean human rating)")
            axes.tick_params(length=0, labelleft=True)
            axes.legend(loc="upper left")
        figure.savefig(path, dpi=130)
