"""``python -m jobs.inspect_data DATA --model MODEL``: statistics and examples of preferences."""

from __future__ import annotations

import numpy as np
from rich.console import Console
from rich.panel import Panel
from rich.table import Column, Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from jobs.cli import command, run_job
from rlhf_critic.config.base import parse_command_line
from rlhf_critic.config.model import EncodingConfig
from rlhf_critic.config.tools import InspectJobConfig
from rlhf_critic.data.encoding import create_encoder
from rlhf_critic.data.preference_dataset import EncodedPreferences, count_leaked
from rlhf_critic.data.preferences import load_preferences
from rlhf_critic.evaluation.preferences import wins

PERCENTILES = (5, 25, 50, 75, 95, 100)


def main() -> None:
    """Reads each source and prints its statistics and examples."""
    config = parse_command_line(InspectJobConfig, prog=command("inspect"))
    encoder = create_encoder(config.model, config.encoding)
    tables = [
        load_preferences(source, encoder, config.cache_dir, fields=config.fields, overlong=config.overlong)
        for source in config.data
    ]
    console = Console()
    for number, table in enumerate(tables):
        console.print(summary(table, tables[:number], config.encoding))
        for row in np.unique(np.linspace(0, len(table) - 1, config.examples).round().astype(int)):
            console.print(example(table, int(row), encoder.tokenizer))


def summary(preferences: EncodedPreferences, before: list[EncodedPreferences], encoding: EncodingConfig) -> Table:
    """Returns a table with the statistics of one source, among them the prompts it shares with those ``before`` it."""
    max_length, special_tokens_in_text = encoding.max_length, encoding.special_tokens_in_text
    ((source, report),) = preferences.reports.items()
    pairs = preferences.comparisons()
    longer = wins((pairs.lengths_P2[:, 0] - pairs.lengths_P2[:, 1]).astype(np.float64))
    shown = Table("measure", Column("value", overflow="fold"), title=Text(source), title_justify="left")
    rows: list[tuple[str, object]] = [
        ("rows read", report.rows),
        *((f"  {shape}", count) for shape, count in sorted(report.shapes.items())),
        ("preferences to train on", report.preferences),
        ("  comparisons in them", len(pairs.rows_P)),
        ("  distinct prompts", len(np.unique(preferences.prompts_N))),
        ("  with a margin", int((~np.isnan(preferences.margins_N)).sum())),
        (f"truncated (over {max_length} tokens)", report.truncated),
        (f"skipped (over {max_length} tokens)", report.skipped_overlong),
        ("skipped (identical responses)", report.identical),
        ("responses that the template drops or changes (kept whole)", report.kept_whole),
        ("responses whose white space the template changes", report.white_space),
        (f"special tokens inside texts (read as {special_tokens_in_text})", report.special_tokens),
        ("responses that begin with their prompt (read as an answer)", report.begin_with_prompt),
        ("duplicates", report.duplicates),
        ("contradictions (same responses, opposite order)", report.contradictions),
        ("the longer response is preferred", f"{longer.mean():.3f} of comparisons (a tie counts half)"),
        ("tokens of all responses with their prompts", report.tokens),
    ]
    for side, column in (("preferred", 0), ("other", 1)):
        lengths = np.percentile(pairs.lengths_P2[:, column], PERCENTILES).round().astype(int)
        percentiles = ", ".join(f"{length} ({of}%)" for length, of in zip(lengths, PERCENTILES, strict=True))
        rows.append((f"tokens of the {side} response with its prompt, percentiles", percentiles))
    subsets, sizes = np.unique(preferences.subsets_N, return_counts=True)
    if len(subsets) > 1:
        rows += [(f"subset {subset or '(none)'}", int(size)) for subset, size in zip(subsets, sizes, strict=True)]
    for other in before:
        rows.append((f"preferences with a prompt of {', '.join(other.reports)}", count_leaked(other, preferences)))
    for measure, value in rows:
        shown.add_row(Text(measure), Text(str(value)))
    return shown


def example(preferences: EncodedPreferences, row: int, tokenizer: PreTrainedTokenizerBase) -> Panel:
    """Returns a preference as the critic reads it: its decoded token ids, with special tokens in reverse video."""
    special = set(tokenizer.all_special_ids)
    shown = Text()
    for place, response in enumerate(preferences[row].responses, start=1):
        ids = response.tolist()
        shown.append(f"{place}. {len(ids)} tokens\n", style="bold")
        starts = [i for i in range(len(ids)) if i == 0 or ids[i] in special or ids[i - 1] in special]
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            text = tokenizer.decode(ids[start:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
            shown.append(text, style="reverse" if ids[start] in special else "")
        shown.append("\n")
    return Panel(shown, title=Text(preferences.origin(row)), subtitle="best first", title_align="left")


if __name__ == "__main__":
    run_job(main)
