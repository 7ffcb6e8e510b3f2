"""The options of scorers: what a replica serves, how many replicas there are, how they are reached.

`ScorerConfig` is what a replica is told, at its start and whenever another critic is published. Knows nothing of Ray.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal, TypeAlias

import tyro
from pydantic import Field, FiniteFloat, PositiveFloat, PositiveInt, StrictStr, field_validator, model_validator

from rlhf_critic.config.base import NonNegativeFloat, NonNegativeInt, PathOrUri, Section, Source, load_config_file

COMPONENT_NAME = r"[A-Za-z_]\w*"


class _Component(Section):
    name: Annotated[StrictStr, Field(pattern=rf"^{COMPONENT_NAME}$")] = Field(
        description="What answers call this component."
    )
    weight: FiniteFloat = Field(1.0, description="It is multiplied by this before components are added.")


class CriticComponent(_Component):
    """The critic's reward."""

    kind: Literal["critic"] = "critic"
    name: str = "critic"


class LengthPenalty(_Component):
    """Minus one for every token of the response beyond ``free_tokens``."""

    kind: Literal["length_penalty"] = "length_penalty"
    name: str = "length_penalty"
    free_tokens: NonNegativeInt = Field(0, description="Tokens of a response that cost nothing.")


class RegexComponent(_Component):
    """One where the pattern is found in the response, else zero."""

    kind: Literal["regex"] = "regex"
    pattern: StrictStr = Field(description="A regular expression of Python's re module.")

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"is not a regular expression: {error}") from error
        return pattern


class PythonComponent(_Component):
    """What a function of the user's returns."""

    kind: Literal["python"] = "python"
    function: Annotated[StrictStr, Field(pattern=rf"^{COMPONENT_NAME}(\.{COMPONENT_NAME})*:{COMPONENT_NAME}$")] = Field(
        description="MODULE:FUNCTION, importable by replicas; called with lists of prompts and responses, it returns "
        "a number for each."
    )


Component: TypeAlias = Annotated[
    CriticComponent | LengthPenalty | RegexComponent | PythonComponent, Field(discriminator="kind")
]


class Components(Section):
    """What a reward is the weighted sum of."""

    components: tuple[Component, ...] = Field((CriticComponent(),), min_length=1)

    @field_validator("components")
    @classmethod
    def _names_once(cls, components: tuple[Component, ...]) -> tuple[Component, ...]:
        names = [component.name for component in components]
        if len(set(names)) < len(names):
            raise ValueError(f"two components have the same name: {', '.join(names)}")
        if sum(isinstance(component, CriticComponent) for component in components) != 1:
            raise ValueError("name the critic exactly once among the components (kind: critic)")
        return components


def load_components(path: str | None) -> tuple[Component, ...]:
    """Reads a YAML file with a list ``components``; without one, the critic is the only component.

    Raises:
        ConfigError: Names the file, the line and what is wrong there.
    """
    return (load_config_file(Components, path) if path else Components()).components


class ScoringOptions(Section):
    """How a scorer answers, whoever runs it."""

    normalize: bool = Field(
        False, description="Put the critic's rewards on the scale of its reference responses: mean 0, deviation 1."
    )
    token_budget: PositiveInt = Field(4096, description="Most tokens computed at once. Changes speed and memory only.")


class CallLimits(Section):
    """What one call of a scorer may ask."""

    max_items: PositiveInt = Field(1024, description="Most items of a call; more are refused.")
    max_text_bytes: PositiveInt = Field(512 * 1024, description="Most bytes of an item's text; longer is refused.")
    max_tokens: PositiveInt = Field(
        32768,
        description="Most tokens of an item's text; longer is refused. Down to the critic's own length limit a text "
        "loses its beginning instead, as in training.",
    )


class ScorerConfig(ScoringOptions, CallLimits, Components):
    """What a scorer serves."""

    checkpoint: PathOrUri = Field(description="A critic directory; path or URI, reachable from every replica.")
    digest: str | None = Field(None, description="The SHA-256 its files must have; None takes any.")


class ServeJobConfig(ScoringOptions, CallLimits):
    """Serves a critic's rewards from a pool of scorer replicas, or updates the pool that runs.

    For example: python -m jobs.serve runs/first/step-000100 --min-replicas 1 --max-replicas 8

    In a Ray cluster it sets the pool up and ends; with none to join, it starts Ray here and stays. A new critic:
    python -m jobs.serve NEW --publish. The end of the pool: python -m jobs.serve --stop
    """

    checkpoint: tyro.conf.Positional[PathOrUri | None] = Field(
        None, description="A critic directory: a checkpoint of a run, or an export; path or URI."
    )
    publish: bool = Field(
        False, description="Swap the critic of the running pool for CHECKPOINT and leave its other options as they are."
    )
    stop: bool = Field(False, description="End the running pool instead.")
    app: str = Field("scorers", description="The pool's name, which clients connect to.")
    min_replicas: NonNegativeInt = Field(1, description="Fewest replicas. 0 lets an idle pool vanish.")
    max_replicas: PositiveInt = Field(1, description="Most replicas.")
    shards: PositiveInt = Field(
        1, description="Devices that share one replica, by ZeRO-3, for a critic larger than one of them."
    )
    cpus_per_shard: PositiveFloat = Field(1.0, description="CPUs that Ray reserves per shard; torch threads if no GPU.")
    use_gpu: bool = Field(False, description="One GPU per shard (not yet run on a GPU).")
    target_ongoing_requests: PositiveFloat = Field(
        8.0, description="Requests per replica that autoscaling aims at: more add replicas, fewer take them away."
    )
    max_ongoing_requests: PositiveInt = Field(
        32,
        description="Most requests that a replica takes at once: some micro-batches full, so that it never waits for "
        "work, and the rest can still go to another.",
    )
    max_queued_requests: PositiveInt = Field(
        200, description="Most requests that wait at one caller for a replica; more are turned away, to be tried again."
    )
    upscale_delay_s: NonNegativeFloat = Field(10.0, description="Seconds of load before replicas are added.")
    downscale_delay_s: NonNegativeFloat = Field(300.0, description="Seconds of idleness before they are taken away.")
    components: PathOrUri | None = Field(
        None, description="YAML file with the components that a reward is the weighted sum of; None: the critic alone."
    )
    host: str = Field("127.0.0.1", description="Where HTTP listens.")
    port: Annotated[int, Field(ge=0, le=65535)] = Field(8000, description="And on which port.")
    auth: Literal["auto", "on", "off"] = Field(
        "auto", description="Whether HTTP wants a bearer token; auto: everywhere but on loopback."
    )
    token_file: str = Field(
        "~/.config/rlhf-critic/token", description="File of the bearer token; made, for you alone, where it is missing."
    )
    max_body_bytes: PositiveInt = Field(16 * 1024 * 1024, description="Most bytes of an HTTP request's body.")
    deadline_s: PositiveFloat = Field(60.0, description="Seconds that an HTTP request waits for its scores.")
    start_timeout_s: PositiveFloat = Field(
        1800.0, description="Seconds to wait for replicas (an autoscaler may have to add nodes)."
    )

    @model_validator(mode="after")
    def _consistent(self) -> ServeJobConfig:
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas {self.max_replicas} is below min_replicas {self.min_replicas}")
        if self.stop and (self.checkpoint or self.publish):
            raise ValueError("stop goes without a checkpoint")
        if not self.stop and not self.checkpoint:
            raise ValueError("a checkpoint is required: python -m jobs.serve CHECKPOINT")
        return self

    def scorer_config(self, checkpoint: str, digest: str) -> ScorerConfig:
        """What replicas are told.

        Raises:
            ConfigError: The file of components cannot be read, or one of them is wrong.
        """
        return ScorerConfig(
            checkpoint=checkpoint,
            digest=digest,
            components=load_components(self.components),
            **self.model_dump(include={*ScoringOptions.model_fields, *CallLimits.model_fields}),
        )


class ScoreJobConfig(ScoringOptions):
    """Scores the responses of a data set with a critic, part by part; a run that was interrupted goes on.

    For example: python -m jobs.score my-critic rollouts.jsonl scored --num-workers 2

    Rows have prompt and response, prompt and responses (a list), messages, text (finished) or token_ids; other fields
    are passed through.
    """

    checkpoint: tyro.conf.Positional[PathOrUri] = Field(
        description="A critic directory: a checkpoint of a run, or an export; path or URI."
    )
    data: tyro.conf.Positional[Source] = Field(
        description="What to score: a file (.jsonl, .json, .parquet, .csv, each also .gz; path or URI), a directory "
        "that datasets saved or a hub id."
    )
    out: tyro.conf.Positional[PathOrUri] = Field(
        description="A directory for the scored parts; a new one, or that of the same job. Reachable from every worker."
    )
    fields: dict[str, str] = Field(
        {}, description="Other field names in the data, ours to theirs: --fields response answer."
    )
    best_of_n: bool = Field(
        False, description="Of rows with responses, write only the best one, as response; of equals, the first."
    )
    format: Literal["auto", "jsonl", "parquet"] = Field(
        "auto", description="Of the parts; auto: parquet where the data is, else jsonl."
    )
    components: PathOrUri | None = Field(
        None, description="YAML file with the components that a reward is the weighted sum of; None: the critic alone."
    )
    rows_per_part: PositiveInt = Field(512, description="Rows of a part: what an interruption may cost.")
    num_workers: PositiveInt = Field(1, description="Scorers, each an actor with the whole critic.")
    cpus_per_worker: PositiveFloat = Field(1.0, description="CPUs that Ray reserves for each; torch threads if no GPU.")
    use_gpu: bool = Field(False, description="One GPU for each (not yet run on a GPU).")
    start_timeout_s: PositiveFloat = Field(
        1800.0, description="Seconds to wait for the workers (an autoscaler may have to add nodes)."
    )

    def scorer_config(self, checkpoint: str, digest: str) -> ScorerConfig:
        """What the scorers are told; there are no callers to be limited.

        Raises:
            ConfigError: The file of components cannot be read, or one of them is wrong.
        """
        return ScorerConfig(
            checkpoint=checkpoint,
            digest=digest,
            components=load_components(self.components),
            max_items=2**31,
            max_text_bytes=2**31,
            max_tokens=2**31,
            **self.model_dump(include=set(ScoringOptions.model_fields)),
        )
