"""``python -m jobs.score CHECKPOINT DATA OUT``: rewards for a data set, with Ray Data over a pool of scorers.

Runs alone (starting a local Ray) or as a Ray job.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from math import ceil
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import ray
from pyarrow import parquet
from ray.exceptions import GetTimeoutError
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from actors.runtime.environment import compute_environment
from actors.runtime.session import init_ray
from actors.runtime.storage import local_directory
from actors.serving.offline import ChunkScorer, RewardSums, ScoringJob, json_line, schema_of
from actors.serving.scorer import check_calibrated, version_name
from jobs.cli import command, run_job, validate_outside_package
from jobs.run_lock import lock_directory
from rlhf_critic.checkpoint.reward_model import check_reward_model
from rlhf_critic.config.base import parse_command_line
from rlhf_critic.config.model import resolve_dtype
from rlhf_critic.config.serve import ScoreJobConfig, ScorerConfig
from rlhf_critic.data.source_parts import PartReader, SourcePart, split_source
from rlhf_critic.data.sources import fingerprint_of
from rlhf_critic.errors import ConfigError, DataError, PlacementError
from rlhf_critic.files import write_text_atomically
from rlhf_critic.scoring.rows import parse_scorable

JOB_NAME = "job.json"
SUMMARY_NAME = "summary.json"
ROWS_A_SCHEMA = 1000


def main() -> None:
    """Scores the data and prints a summary."""
    config = parse_command_line(ScoreJobConfig, prog=command("score"))
    summary = score(config)
    title = f"{config.out}: rewards of {summary['model_version']}"
    table = Table("rows", "responses", "mean", "standard deviation", "truncated", title=title, title_justify="left")
    mean, deviation = f"{summary['reward_mean']:.4f}", f"{summary['reward_std']:.4f}"
    table.add_row(str(summary["rows"]), str(summary["responses"]), mean, deviation, str(summary["truncated"]))
    Console().print(table)


def score(config: ScoreJobConfig) -> dict[str, Any]:
    """Scores the parts that are not scored yet.

    Returns:
        The summary that is also written to OUT.

    Raises:
        CriticError: The critic, the data or the options are invalid, or OUT belongs to another job or is in use.
    """
    started = time.perf_counter()
    if "://" in config.out:
        raise ConfigError(f"OUT {config.out!r} must be a path, because workers write files there; mount the store")
    validate_outside_package("OUT", config.out)
    with local_directory(config.checkpoint) as directory:
        model = check_reward_model(directory, config.checkpoint, config.encoding)
        card = model.opened.card
        if config.normalize:
            card.reward_scale()
        scorer = config.scorer_config(config.checkpoint, model.digest)
        check_calibrated(scorer, model.opened.posterior() is not None)
    data = config.data
    version = version_name(card.version, model.digest, scorer, resolve_dtype(scorer.dtype, config.use_gpu))
    fingerprint = fingerprint_of(data)
    data_is_parquet = Path(data.removesuffix(".gz")).suffix == ".parquet"
    is_parquet = config.format == "parquet" or (config.format == "auto" and data_is_parquet)
    sources = tuple(split_source(data, config.rows_per_part))
    ends, schema = _read_through(config, scorer, sources, wants_schema=is_parquet)
    rows = ends[-1]
    if is_parquet and data_is_parquet:  # its types are narrower than those of the decoded rows
        schema = _schema_of_file(config)
    out = Path(config.out)
    job = ScoringJob(
        data,
        config.fields,
        out,
        "parquet" if is_parquet else "jsonl",
        schema,
        config.rows_per_part,
        config.best_of_n,
        sources,
        ends,
    )
    same = {"data": fingerprint, "model_version": version, "fields": config.fields, "best_of_n": config.best_of_n}
    taken = f"another job is at work on {out}: wait until it ends, stop it, or give another directory"
    with lock_directory(out.absolute(), f"OUT {out}", taken):
        _claim(out, same | {"format": job.format, "rows_per_part": config.rows_per_part})
        parts = -(-rows // config.rows_per_part)
        missing = [number for number in range(parts) if not job.path(number).exists()]
        if missing:
            (out / SUMMARY_NAME).unlink(missing_ok=True)
            _score_parts(missing, rows, job, scorer, config)
        if fingerprint_of(data) != fingerprint:
            raise DataError(
                f"{data}: changed during scoring, so rewards may belong to other rows: delete {out} and score again"
            )
        summary = _summarise(job, parts, version, time.perf_counter() - started)
        write_text_atomically(out / SUMMARY_NAME, json.dumps(summary, indent=2) + "\n")
    return summary


def _read_through(
    config: ScoreJobConfig, scorer: ScorerConfig, sources: tuple[SourcePart, ...], wants_schema: bool
) -> tuple[tuple[int, ...], pa.Schema | None]:
    """Reads all rows once, so that a bad row is reported before scoring begins.

    Returns:
        The number of rows up to the end of each part of the source, and the common schema of the rows without responses
        that are not written.
    """
    data = config.data
    ours = ("reward", "truncated", "model_version", *(f"reward_{component.name}" for component in scorer.components))
    list_field = config.fields.get("responses", "responses")
    schema: pa.Schema = pa.schema([])
    chunk: list[dict[str, Any]] = []
    shapes: set[bool] = set()
    count = 0

    def merge_chunk() -> pa.Schema:
        try:
            return pa.unify_schemas([schema, schema_of(chunk)], promote_options="permissive")
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise DataError(
                f"{data}: a field of the first {count} rows has values of several types, which Parquet cannot hold: "
                f"{error}; use --format jsonl"
            ) from error
        except UnicodeEncodeError as error:
            raise DataError(
                f"{data}: a field holds half of a surrogate pair up to row {count}: {error}; fix or remove that row"
            ) from error

    reader, ends = PartReader(data), []

    def read() -> Iterator[tuple[int, dict[str, Any]]]:
        for part in sources:
            yield from reader.read(part)
            ends.append(count)

    for line, row in tqdm(read(), desc="reading", unit="row", disable=None):
        place = f"{data}:{line}"
        parse_scorable(place, row, config.fields)
        if config.best_of_n and row.get(list_field) is None:
            raise DataError(f"{place}: --best-of-n needs rows with responses; omit it, or name the field by --fields")
        for name in ours:
            if name in row:
                raise DataError(f"{place}: field {name!r} exists already and would be overwritten; rename it")
        count += 1
        shapes.add(row.get(list_field) is not None)
        if wants_schema and len(shapes) > 1:
            raise DataError(
                f"{place}: some rows have one response and others a list, and a Parquet column holds either numbers or "
                "lists; use --format jsonl"
            )
        if wants_schema:
            chunk.append({name: value for name, value in row.items() if not (config.best_of_n and name == list_field)})
            if len(chunk) == ROWS_A_SCHEMA:
                schema, chunk = merge_chunk(), []
            continue
        try:
            json_line(row)
        except UnicodeEncodeError as error:
            raise DataError(
                f"{place}: holds half of a surrogate pair, which is not text: {error}; fix or remove this row"
            ) from error
        except ValueError as error:
            raise DataError(f"{place}: cannot be written as JSON: {error}; use --format parquet") from error
    if not count:
        raise DataError(f"{data}: has no rows; give a source with at least one row")
    return tuple(ends), merge_chunk() if wants_schema else None


def _schema_of_file(config: ScoreJobConfig) -> pa.Schema:
    with fsspec.open(config.data, "rb", compression="infer") as file:
        schema = parquet.read_schema(file)
    list_field = schema.get_field_index(config.fields.get("responses", "responses"))
    return schema.remove(list_field) if config.best_of_n and list_field >= 0 else schema


def _claim(out: Path, job: dict[str, Any]) -> None:
    """Claims OUT for this job, or checks that it belongs to this job."""
    path = out / JOB_NAME
    out.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        if any(out.iterdir()):
            raise ConfigError(f"{out}: is not empty and holds no {JOB_NAME}: give a new directory")
        write_text_atomically(path, json.dumps(job, indent=2) + "\n")
        return
    there = json.loads(path.read_text(encoding="utf-8"))
    for name, value in job.items():
        if there.get(name) != value:
            raise ConfigError(
                f"{out}: was started with another {name} ({there.get(name)!r}, now {value!r}): give a new directory, "
                "or resume with the same critic, data and options"
            )
    for incomplete in out.glob(".part-*"):
        incomplete.unlink()


def _score_parts(missing: list[int], rows: int, job: ScoringJob, scorer: ScorerConfig, config: ScoreJobConfig) -> None:
    if not ray.is_initialized():
        init_ray()
    to_do = sum(min(job.rows_per_part, rows - number * job.rows_per_part) for number in missing)
    with tqdm(total=rows, initial=rows - to_do, desc="scoring", unit="row", disable=None) as bar:
        try:
            for done in _run_chunks(missing, job, scorer, config):
                if done["error"] is not None:
                    raise done["error"]
                bar.update(done["rows"])
        except GetTimeoutError as error:
            raise PlacementError(
                f"{config.num_workers} scorers with {config.cpus_per_worker:g} CPU{' and a GPU' * config.use_gpu} each "
                f"could not be placed within {config.start_timeout_s:g} s: the cluster has "
                f"{ray.cluster_resources().get('CPU', 0):g} CPU and {ray.cluster_resources().get('GPU', 0):g} GPU. Use "
                "fewer (--num-workers), let the autoscaler add nodes, or wait longer (--start-timeout-s)"
            ) from error


def _run_chunks(
    missing: list[int], job: ScoringJob, scorer: ScorerConfig, config: ScoreJobConfig
) -> Iterator[dict[str, Any]]:
    """Distributes the parts over an actor pool and yields the result of each as it arrives."""
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.execution_no_progress_timeout_s = -1  # a part may take a long time
    context.wait_for_min_actors_s = ceil(config.start_timeout_s)
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    with ray.data.DataContext.current(context):
        parts = ray.data.from_items([{"part": number} for number in missing], override_num_blocks=len(missing))
        results = parts.map_batches(
            ChunkScorer,
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(config.num_workers, len(missing))),
            fn_constructor_args=(job, scorer, config.use_gpu),
            num_cpus=config.cpus_per_worker,
            num_gpus=int(config.use_gpu),
            runtime_env={"env_vars": compute_environment(config.use_gpu)},
        )
        for batch in results.iter_batches(batch_size=1, prefetch_batches=0, batch_format="pandas"):
            yield batch.to_dict("records")[0]


def _summarise(job: ScoringJob, parts: int, version: str, seconds: float) -> dict[str, Any]:
    sums = RewardSums()
    for number in range(parts):
        sums.add(job.path(number))
    return {
        "rows": sums.rows,
        "responses": sums.responses,
        "reward_mean": sums.mean,
        "reward_std": sums.std,
        "truncated": sums.truncated,
        "model_version": version,
        "seconds": seconds,
    }


if __name__ == "__main__":
    run_job(main)
