"""Options of ``jobs.inspect_data``, ``jobs.evaluate`` and ``jobs.export``."""

from __future__ import annotations

from typing import Annotated, Literal

import tyro
from pydantic import (
    Field,
    PositiveInt,
)

from rlhf_critic.config.base import NonNegativeInt, Section
from rlhf_critic.config.model import EncodingConfig


class InspectJobConfig(Section):
    """Reads preferences as a training job would, counts what is in them and shows some as the critic will see them.

    For example: python -m jobs.inspect_data prefs.jsonl --model MODEL
    """

    data: tyro.conf.Positional[tuple[str, ...]] = Field(
        min_length=1, description="One or more sources of preferences; see data.train of jobs.train."
    )
    model: str = Field(description="The model whose tokenizer encodes them: a directory or hub id.")
    encoding: EncodingConfig = EncodingConfig()
    fields: dict[str, str] = Field({}, description="See data.fields of jobs.train.")
    overlong: Literal["truncate", "skip"] = Field("truncate", description="See data.overlong of jobs.train.")
    examples: NonNegativeInt = Field(3, description="Preferences of each source that are shown, from first to last.")
    cache_dir: str = Field(".cache", description="Local directory for encoded data. Safe to delete.")


class EvaluateJobConfig(Section):
    """Scores preferences with a critic and says how well the two agree. Runs on this machine, without Ray."""

    checkpoint: tyro.conf.Positional[str] = Field(
        description="A critic directory: a checkpoint of a run, or an export; path or URI."
    )
    data: tyro.conf.Positional[str] = Field(
        description="Preferences or best-of-n rows: a file (.jsonl, .json, .parquet, .csv, each also .gz; path or "
        "URI), a directory that datasets saved or a hub id."
    )
    token_budget: PositiveInt = Field(4096, description="Most tokens computed at once. Changes speed and memory only.")
    cache_dir: str = Field(".cache", description="Local directory for encoded data. Safe to delete.")
    json_output: bool = Field(False, description="Print one JSON object instead of a table.")
    report: str | None = Field(
        None, description="A new or empty local directory for metrics.json and report.html, one page with plots."
    )


class ExportJobConfig(Section):
    """Copies a critic out of a run, without what only a resumed run needs, or converts another system's reward model.

    For example: python -m jobs.export deepspeed-chat-output my-critic --base facebook/opt-350m
    """

    checkpoint: tyro.conf.Positional[str] = Field(
        description="A critic directory, such as a checkpoint of a run, or another system's; path or URI."
    )
    out: tyro.conf.Positional[str] = Field(description="The directory to make.")
    auto_map: bool = Field(
        False, description="Ship a modeling file: trust_remote_code=True then gives a value at every token too."
    )
    source_format: Annotated[
        Literal["auto", "deepspeed-chat", "trlx", "article", "native"], tyro.conf.arg(name="from")
    ] = Field(
        "auto",
        description="Whose names the weights have; auto takes a directory with critic.json as it is and recognises "
        "others by their keys. native is a sequence-classification model, such as TRL's and OpenRLHF's.",
    )
    base: str | None = Field(
        None,
        description="Another system's only: the base model, a directory or hub id, for the config or tokenizer that "
        "the checkpoint lacks.",
    )
    max_length: PositiveInt | None = Field(
        None, description="Another system's only: see encoding.max_length of jobs.train; default 1024 at most."
    )
    chat_template: str | None = Field(
        None,
        description="Another system's only: see encoding.chat_template of jobs.train; default plain, for native auto.",
    )
    head_bias: Literal["refuse", "reward-mean"] = Field(
        "refuse",
        description="Another system's only: what becomes of a head's bias, which a critic has not. reward-mean puts "
        "its negative into critic.json, and the bias, which added to a reward is the other system's score.",
    )
