"""``python -m jobs.evaluate CHECKPOINT DATA``: accuracy of a critic on preferences, best-of-n rows or targets."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jobs.cli import command, run_job
from jobs.evaluate_sections import (
    against_section,
    benchmark_section,
    health_section,
    load_reward_model,
    score_with_stds,
    uncertainty_section,
)
from rlhf_critic.batching.prefix_tree import TokenIds
from rlhf_critic.checkpoint.critic_directory import LoadedCritic
from rlhf_critic.config.base import parse_command_line
from rlhf_critic.config.model import resolve_dtype
from rlhf_critic.config.tools import EvaluateJobConfig
from rlhf_critic.data.preference_dataset import PREFERENCE, EncodedPreferences
from rlhf_critic.data.preferences import load_preferences
from rlhf_critic.data.sources import read_rows
from rlhf_critic.errors import ConfigError
from rlhf_critic.evaluation.best_of_n import (
    BestOfNEvaluation,
    evaluate_best_of_n,
    is_best_of_n,
    load_best_of_n,
    split_rewards,
)
from rlhf_critic.evaluation.pointwise import PointwiseEvaluation, evaluate_pointwise, losses_of_rows
from rlhf_critic.evaluation.preferences import Evaluation, evaluate_rewards
from rlhf_critic.evaluation.report import (
    MAX_WRONG_EXAMPLES,
    Bar,
    HighlightedExample,
    Page,
    Plot,
    best_of_n_figures,
    highlighted_example,
    pointwise_figures,
    preference_figures,
    validate_report_directory,
    write_report,
)
from rlhf_critic.evaluation.rewardbench import load_benchmark, score_benchmark
from rlhf_critic.model.device import configure_device, select_device
from rlhf_critic.model.factory import DTYPE_OF
from rlhf_critic.scoring.local import score_sequences, value_sequences


def main() -> None:
    """Evaluates, prints and writes the report."""
    config = parse_command_line(EvaluateJobConfig, prog=command("evaluate"))
    if config.report is not None:
        validate_report_directory(config.report)
    evaluation, page = evaluate(config)
    more = {section.name: section.data for section in page.sections}
    if config.report is not None:
        metrics = {"critic": page.title, "source": page.source, "evaluation": evaluation.to_dict(), **more}
        write_report(config.report, metrics, page)
    if config.json_output:
        print(json.dumps({**evaluation.to_dict(), **more}))
        return
    console = Console()
    for table in tables(page):
        console.print(table)
    if config.report is not None:
        console.print(f"report: {config.report}", markup=False, highlight=False)


def evaluate(config: EvaluateJobConfig) -> tuple[Evaluation | PointwiseEvaluation | BestOfNEvaluation, Page]:
    """Scores all responses and compares their rewards. The first row tells best-of-n rows from others.

    Returns:
        The evaluation, and the content of its report.

    Raises:
        CriticError: The checkpoint or the data cannot be read, or there is no GPU for ``use_gpu``.
    """
    configure_device(select_device(config.use_gpu), DTYPE_OF[resolve_dtype(config.dtype, config.use_gpu)])
    loaded = load_reward_model(config.checkpoint, config)
    if config.other_domain is not None and loaded.posterior is None:
        raise ConfigError(
            f"other_domain needs the uncertainty of a calibrated critic: run rlhf-critic calibrate {config.checkpoint}"
        )
    _, first_row = next(read_rows(config.data))
    if config.benchmark is None and not is_best_of_n(first_row):
        return _evaluate_rows(loaded, config)
    if config.against is not None or config.other_domain is not None:
        raise ConfigError("against and other_domain need preferences, and DATA has best-of-n rows: leave them out")
    return _evaluate_best_of_n(loaded, config)


def _evaluate_rows(loaded: LoadedCritic, config: EvaluateJobConfig) -> tuple[Evaluation | PointwiseEvaluation, Page]:
    """Evaluates the preferences of the data, and beside them or alone its rows with targets."""
    rows = load_preferences(config.data, loaded.encoder, config.cache_dir)
    pairs = rows.pairs_alone()
    if len(pairs) == len(rows):
        return _evaluate_preferences(loaded, config, rows)
    pointwise, page = _evaluate_pointwise(loaded, config, rows.select(np.flatnonzero(rows.kinds_N != PREFERENCE)))
    if not len(pairs):
        return pointwise, page
    compared, shown = _evaluate_preferences(loaded, config, pairs)
    both = dataclasses.replace(
        shown,
        figures=[*shown.figures, *page.figures],
        plots=[*shown.plots, *page.plots],
        examples=[*shown.examples, *page.examples],
    )
    return dataclasses.replace(compared, pointwise=pointwise), both


def _evaluate_pointwise(
    loaded: LoadedCritic, config: EvaluateJobConfig, rows: EncodedPreferences
) -> tuple[PointwiseEvaluation, Page]:
    taken = rows.take(np.arange(len(rows)))
    values = value_sequences(loaded.critic, [row.responses[0] for row in taken], config.token_budget)
    kinds, targets = [row.kind for row in taken], [row.targets_A for row in taken]
    at_targets = [value_T[row.tokens_A] for row, value_T in zip(taken, values, strict=True)]
    rewards_N = np.array([value_T[-1] for value_T in values], dtype=np.float64)
    evaluation = evaluate_pointwise(kinds, targets, at_targets, rewards_N)
    losses_N = losses_of_rows(kinds, targets, at_targets)
    wrong = []
    for row in losses_N.argsort(kind="stable")[::-1][:MAX_WRONG_EXAMPLES].tolist():
        figures = ", ".join(
            f"{value:.2f} ({target:g})" for value, target in zip(at_targets[row], targets[row], strict=True)
        )
        note = f"{kinds[row]}: loss {losses_N[row]:.3f}; value (target): {figures}"
        wrong.append(_decode_example(loaded, rows.origin(row), note, {"response": taken[row].responses[0]}))
    return evaluation, Page(
        title=loaded.card.version,
        source=str(rows),
        figures=pointwise_figures(evaluation),
        baseline_name="",
        bars=[],
        plots=_pointwise_plots(evaluation, rewards_N) if config.report is not None else [],
        examples=wrong,
    )


def _pointwise_plots(evaluation: PointwiseEvaluation, rewards_N: NDArray[np.float64]) -> list[Plot]:
    from rlhf_critic.evaluation.plots import histogram_svg, reliability_svg

    plots = [Plot("Rewards", "Values at the last token of all responses.", histogram_svg(rewards_N, "reward"))]
    for name, part in (("labels", evaluation.label), ("steps", evaluation.steps)):
        if part:
            caption = f"Share of {name} that are as predicted, by the critic's confidence."
            svg = reliability_svg(part.calibration.raw, part.calibration.scaled)
            plots.append(Plot(f"Reliability of {name}", caption, svg))
    return plots


def _evaluate_preferences(
    loaded: LoadedCritic, config: EvaluateJobConfig, preferences: EncodedPreferences
) -> tuple[Evaluation, Page]:
    sequences = preferences.responses()
    pairs = preferences.comparisons()
    std_R = margin_std_P = None
    if loaded.posterior is None:
        rewards_R = score_sequences(loaded.critic, sequences, config.token_budget).astype(np.float64)
    else:
        rewards, std_R, margin_std_P = score_with_stds(loaded, loaded.posterior, preferences, config.token_budget)
        rewards_R = rewards.astype(np.float64)
    rewards_P2 = np.stack([rewards_R[pairs.better_P], rewards_R[pairs.worse_P]], axis=1)
    evaluation = evaluate_rewards(rewards_P2[:, 0], rewards_P2[:, 1], pairs.lengths_P2, pairs.subsets_P, pairs.rows_P)
    margin_P = rewards_P2[:, 0] - rewards_P2[:, 1]
    sections = []
    if std_R is not None and margin_std_P is not None:
        sections.append(uncertainty_section(loaded, config, margin_P, margin_std_P, std_R))
    if config.report is not None:
        sections.append(health_section(loaded, config))
    if config.against is not None:
        sections.append(against_section(config, loaded, preferences, margin_P))
    wrong = []
    for pair in _lowest(margin_P):
        texts = {
            f"chosen, reward {rewards_P2[pair, 0]:.3f}": sequences[pairs.better_P[pair]],
            f"rejected, reward {rewards_P2[pair, 1]:.3f}": sequences[pairs.worse_P[pair]],
        }
        origin = preferences.origin(int(pairs.rows_P[pair]))
        wrong.append(_decode_example(loaded, origin, f"margin {margin_P[pair]:.3f}", texts))
    return evaluation, Page(
        title=loaded.card.version,
        source=str(preferences),
        figures=preference_figures(evaluation),
        baseline_name="longer text wins",
        bars=[Bar(one.name, one.preferences, one.accuracy, one.length_baseline.mean) for one in evaluation.subsets],
        plots=_preference_plots(evaluation, rewards_P2, pairs.lengths_P2) if config.report is not None else [],
        examples=wrong,
        sections=sections,
    )


def _evaluate_best_of_n(loaded: LoadedCritic, config: EvaluateJobConfig) -> tuple[BestOfNEvaluation, Page]:
    benchmark = config.benchmark
    if benchmark is None:
        rows = load_best_of_n(config.data, loaded.encoder)
    else:
        rows = load_benchmark(benchmark, config.data, loaded.encoder)
    sequences = [np.asarray(ids, dtype=np.int32) for row in rows for ids in row.sequences]
    rewards = score_sequences(loaded.critic, sequences, config.token_budget).astype(np.float64)
    evaluation = evaluate_best_of_n(rows, rewards)
    by_row = split_rewards(rows, rewards)
    lead_N = np.array([right.max() - wrong.max() for right, wrong in by_row])
    wrong_examples = []
    for index in _lowest(lead_N):
        row, (right, wrong) = rows[index], by_row[index]
        best_right, best_wrong = int(right.argmax()), int(wrong.argmax())
        texts = {
            f"best correct response, reward {right[best_right]:.3f}": row.sequences[best_right],
            f"best wrong response, reward {wrong[best_wrong]:.3f}": row.sequences[row.right + best_wrong],
        }
        wrong_examples.append(_decode_example(loaded, row.origin, f"lead {lead_N[index]:.3f}", texts))
    return evaluation, Page(
        title=loaded.card.version,
        source=f"{config.data}: {len(rows)} best-of-n rows, {sum(row.truncated for row in rows)} with truncated texts",
        figures=best_of_n_figures(evaluation),
        baseline_name="chance",
        bars=[Bar(one.name, one.rows, one.accuracy, one.chance) for one in evaluation.subsets],
        plots=_best_of_n_plots(lead_N) if config.report is not None else [],
        examples=wrong_examples,
        sections=[] if benchmark is None else [benchmark_section(score_benchmark(benchmark, rows, rewards))],
    )


def _preference_plots(
    evaluation: Evaluation, rewards_P2: NDArray[np.float64], lengths_P2: NDArray[np.int64]
) -> list[Plot]:
    from rlhf_critic.evaluation.plots import histogram_svg, length_svg, reliability_svg

    calibration = evaluation.calibration
    return [
        Plot(
            "Reliability",
            "Share in which the preferred side was chosen, by the critic's confidence. Below the line the critic is "
            "overconfident. The size of a dot shows the number of preferences.",
            reliability_svg(calibration.raw, calibration.scaled),
        ),
        Plot(
            "Margins",
            "Chosen minus rejected reward. Negative margins are errors.",
            histogram_svg(rewards_P2[:, 0] - rewards_P2[:, 1], "margin"),
        ),
        Plot(
            "Reward against length",
            "If the median rises with length, a policy trained with this critic may learn to write longer texts.",
            length_svg(rewards_P2, lengths_P2),
        ),
    ]


def _best_of_n_plots(lead_N: NDArray[np.float64]) -> list[Plot]:
    from rlhf_critic.evaluation.plots import histogram_svg

    caption = "Highest reward of a correct response minus highest reward of a wrong one. Negative leads are errors."
    return [Plot("Leads", caption, histogram_svg(lead_N, "lead"))]


def _lowest(lead_N: NDArray[np.float64]) -> list[int]:
    """Returns the rows with the most negative leads, the lowest first."""
    return [int(row) for row in lead_N.argsort(kind="stable")[:MAX_WRONG_EXAMPLES] if lead_N[row] < 0]


def _decode_example(
    loaded: LoadedCritic, origin: str, note: str, sequences: Mapping[str, TokenIds]
) -> HighlightedExample:
    tokenizer = loaded.encoder.tokenizer
    texts = {label: str(tokenizer.decode(list(ids), skip_special_tokens=False)) for label, ids in sequences.items()}
    return highlighted_example(origin, note, texts, tokenizer.all_special_tokens)


def tables(page: Page) -> list[Table]:
    """Returns tables of the figures and, if rows have tags, of accuracy by subset."""
    title = escape(f"{page.title} on {page.source}")
    figures = Table("measure", "value [95% interval]", "meaning", title=title, title_justify="left")
    for figure in page.figures:
        figures.add_row(figure.name, escape(figure.value), figure.meaning)
    further = []
    for section in page.sections:
        of_section = Table(*section.columns, title=escape(f"{section.title}. {section.note}"), title_justify="left")
        for row in section.rows:
            of_section.add_row(*map(escape, row))
        further.append(of_section)
    if not page.bars:
        return [figures, *further]
    columns = ("subset", "accuracy [95% interval]", page.baseline_name, "count")
    subsets = Table(*columns, title="by subset", title_justify="left")
    for bar in page.bars:
        name, accuracy = escape(bar.name or "(no tag)"), escape(str(bar.accuracy))
        subsets.add_row(name, accuracy, f"{bar.baseline:.3f}", str(bar.count))
    return [figures, subsets, *further]


if __name__ == "__main__":
    run_job(main)
