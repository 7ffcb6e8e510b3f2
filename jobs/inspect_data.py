"""``python -m jobs.inspect_data DATA --model MODEL``: statistics and examples of preferences, printed and as a page."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.panel import Panel
from rich.table import Column, Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from jobs.cli import command, run_job
from rlhf_critic.checkpoint.reward_model import ignored_end_at_start
from rlhf_critic.config.base import parse_command_line
from rlhf_critic.config.model import EncodingConfig
from rlhf_critic.config.tools import InspectJobConfig
from rlhf_critic.data.encoding import create_encoder
from rlhf_critic.data.preference_dataset import (
    PREFERENCE,
    ROW_KINDS,
    EncodedPreference,
    EncodedPreferences,
    IdArray,
    count_leaked,
    count_repeated,
)
from rlhf_critic.data.preferences import load_preferences
from rlhf_critic.evaluation.preferences import wins
from rlhf_critic.evaluation.report import (
    Figure,
    Page,
    Plot,
    Section,
    highlighted_example,
    validate_report_directory,
    write_report,
)

PERCENTILES = (5, 25, 50, 75, 95, 100)


def main() -> None:
    """Reads each source, prints its statistics and examples, and writes the report."""
    config = parse_command_line(InspectJobConfig, prog=command("inspect"))
    if config.report is not None:
        validate_report_directory(config.report)
    encoder = create_encoder(config.model, config.encoding, ignored_end_at_start(config.model))
    tables = [
        load_preferences(
            source,
            encoder,
            config.cache_dir,
            fields=config.fields,
            overlong=config.overlong,
            decontaminate=config.decontaminate,
            ngram=config.decontaminate_ngram,
        )
        for source in config.data
    ]
    console = Console()
    repeated = count_repeated(tables)
    of_sources = [
        statistics(table, tables[:number], repeated[number], config.encoding) for number, table in enumerate(tables)
    ]
    for table, measures in zip(tables, of_sources, strict=True):
        shown = Table("measure", Column("value", overflow="fold"), title=Text(source_of(table)), title_justify="left")
        for measure, value in measures:
            shown.add_row(Text(measure), Text(value))
        console.print(shown)
        for row in examples_of(table, config.examples):
            console.print(example(table, row, encoder.tokenizer))
    if config.report is not None:
        metrics = {
            source_of(table): {
                **asdict(table.reports[source_of(table)]),
                "duplicates_in_all_sources": duplicates,
                "contradictions_in_all_sources": contradictions,
            }
            for table, (duplicates, contradictions) in zip(tables, repeated, strict=True)
        }
        write_report(config.report, metrics, page_of(tables, of_sources, config, encoder.tokenizer))
        console.print(f"report: {config.report}", markup=False, highlight=False)


def source_of(preferences: EncodedPreferences) -> str:
    """Returns the source of a table that has one."""
    (source,) = preferences.reports
    return source


def examples_of(preferences: EncodedPreferences, count: int) -> list[int]:
    """Returns evenly spaced rows."""
    return [int(row) for row in np.unique(np.linspace(0, len(preferences) - 1, count).round())]


def statistics(
    preferences: EncodedPreferences,
    before: list[EncodedPreferences],
    repeated: tuple[int, int],
    encoding: EncodingConfig,
) -> list[tuple[str, str]]:
    """Returns measures of one source with their values.

    Args:
        preferences: Table of the source.
        before: Tables of the sources before it. Prompts that it shares with them are counted.
        repeated: Number of its rows that repeat and that reverse one before them, in all sources.
        encoding: Options of the encoder.
    """
    max_length, special_tokens_in_text = encoding.max_length, encoding.special_tokens_in_text
    report = preferences.reports[source_of(preferences)]
    pairs = preferences.comparisons()
    rows: list[tuple[str, object]] = [
        ("rows read", report.rows),
        *((f"  {shape}", count) for shape, count in sorted(report.shapes.items())),
        ("preferences to train on", report.preferences - report.pointwise),
        ("  comparisons in them", len(pairs.rows_P)),
        ("  distinct prompts", len(np.unique(preferences.prompts_N))),
        ("  with a margin", int((~np.isnan(preferences.margins_N)).sum())),
        ("rows with targets", report.pointwise),
        (f"truncated (over {max_length} tokens)", report.truncated),
        (f"skipped (over {max_length} tokens)", report.skipped_overlong),
        ("skipped (identical responses)", report.identical),
        ("left out (overlap with a benchmark)", report.contaminated),
        ("responses that the template drops or changes (kept whole)", report.kept_whole),
        ("responses whose white space the template changes", report.white_space),
        (f"special tokens inside texts (read as {special_tokens_in_text})", report.special_tokens),
        ("responses that begin with their prompt (read as an answer)", report.begin_with_prompt),
        ("rows with an empty turn", report.empty_turns),
        *((f"turns of role {role}", count) for role, count in sorted(report.roles.items())),
        ("duplicates", report.duplicates),
        ("contradictions (same responses, opposite order)", report.contradictions),
        ("duplicates, sources before this one included (data.deduplicate leaves them out)", repeated[0]),
        ("contradictions, sources before this one included", repeated[1]),
        ("the longer response is preferred", f"{longer_wins(pairs.lengths_P2)} of comparisons (a tie counts half)"),
        ("tokens of all responses with their prompts", report.tokens),
    ]
    for kind, tokens in (
        ("the preferred response", pairs.lengths_P2[:, 0]),
        ("the other response", pairs.lengths_P2[:, 1]),
        ("a response with targets", preferences.tokens_N[preferences.kinds_N != PREFERENCE]),
    ):
        if len(tokens):
            lengths = np.percentile(tokens, PERCENTILES).round().astype(int)
            percentiles = ", ".join(f"{length} ({of}%)" for length, of in zip(lengths, PERCENTILES, strict=True))
            rows.append((f"tokens of {kind} with its prompt, percentiles", percentiles))
    subsets, sizes = np.unique(preferences.subsets_N, return_counts=True)
    if len(subsets) > 1:
        rows += [(f"subset {subset or '(none)'}", int(size)) for subset, size in zip(subsets, sizes, strict=True)]
    for other in before:
        rows.append((f"preferences with a prompt of {', '.join(other.reports)}", count_leaked(other, preferences)))
    return [(measure, str(value)) for measure, value in rows]


def longer_wins(lengths_P2: NDArray[np.int64]) -> str:
    """Returns the share of comparisons whose better response is the longer one; a tie counts half."""
    return f"{wins((lengths_P2[:, 0] - lengths_P2[:, 1]).astype(np.float64)).mean():.3f}" if len(lengths_P2) else "none"


def page_of(
    tables: list[EncodedPreferences],
    of_sources: list[list[tuple[str, str]]],
    config: InspectJobConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> Page:
    """Returns the content of the report: the statistics of all sources, their lengths and examples."""
    from rlhf_critic.evaluation.plots import lengths_svg  # matplotlib is slow to import

    lengths = [table.comparisons().lengths_P2 for table in tables]
    lengths_P2 = np.concatenate(lengths)
    repeated = sum(table.reports[source_of(table)].duplicates for table in tables)
    shown = [(table, row) for table in tables for row in examples_of(table, config.examples)]
    return Page(
        title=f"{sum(map(len, tables))} rows",
        source=f"{', '.join(map(source_of, tables))}; tokenizer of {config.model}",
        figures=[
            Figure("comparisons", str(len(lengths_P2)), "pairs of responses in all preferences"),
            Figure("longer response preferred", longer_wins(lengths_P2), "share of comparisons; a tie counts half"),
            Figure("duplicates", str(repeated), "preferences that repeat an earlier one of their source"),
        ],
        plots=[
            Plot(f"Lengths of {source_of(table)}", "Tokens of responses with their prompts.", lengths_svg(of_table))
            for table, of_table in zip(tables, lengths, strict=True)
            if len(of_table)
        ],
        sections=[
            Section("statistics", source_of(table), "", ("measure", "value"), measures, {})
            for table, measures in zip(tables, of_sources, strict=True)
        ],
        examples_title="Examples",
        examples_note="Evenly spaced rows, as the critic reads them",
        examples=[
            highlighted_example(
                table.origin(row),
                note_of(table[row]),
                {f"{place}.": decode(ids, tokenizer) for place, ids in enumerate(table[row].responses, 1)},
                tokenizer.all_special_tokens,
            )
            for table, row in shown
        ],
    )


def note_of(row: EncodedPreference) -> str:
    """Returns what the order of the responses of a row says, or its kind of target."""
    return "best first" if row.kind == ROW_KINDS[PREFERENCE] else f"with a target: {row.kind}"


def decode(ids: IdArray, tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns the text of token ids, special ones included."""
    return str(tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def example(preferences: EncodedPreferences, row: int, tokenizer: PreTrainedTokenizerBase) -> Panel:
    """Returns a preference as the critic reads it: its decoded token ids, with special tokens in reverse video."""
    special = set(tokenizer.all_special_ids)
    shown = Text()
    for place, response in enumerate(preferences[row].responses, start=1):
        ids = response.tolist()
        shown.append(f"{place}. {len(ids)} tokens\n", style="bold")
        starts = [i for i in range(len(ids)) if i == 0 or ids[i] in special or ids[i - 1] in special]
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            shown.append(decode(response[start:end], tokenizer), style="reverse" if ids[start] in special else "")
        shown.append("\n")
    return Panel(shown, title=Text(preferences.origin(row)), subtitle=note_of(preferences[row]), title_align="left")


if __name__ == "__main__":
    run_job(main)
