"""Options of ``rlhf-critic serve`` and ``rlhf-critic score``. Knows nothing about Ray.

A replica receives a `ScorerConfig` at its start and whenever another critic is published.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal, TypeAlias

import tyro
from pydantic import Field, FiniteFloat, PositiveFloat, PositiveInt, StrictStr, field_validator, model_validator

from rlhf_critic.config.base import (
    ModelPath,
    NonNegativeFloat,
    NonNegativeInt,
    PathOrUri,
    Section,
    Source,
    load_config_file,
)
from rlhf_critic.config.model import AssumedEncoding, AutoDtype
from rlhf_critic.errors import ConfigError

COMPONENT_NAME = r"[A-Za-z_]\w*"


class _Component(Section):
    name: Annotated[StrictStr, Field(pattern=rf"^{COMPONENT_NAME}$")]
    """Name of this component in answers."""
    weight: FiniteFloat = 1.0
    """Factor on this component in the sum of components."""


class CriticComponent(_Component):
    """The component that is the critic's reward."""

    kind: Literal["critic"] = "critic"
    name: str = "critic"


class UncertaintyComponent(_Component):
    """The standard deviation of the critic's reward. The critic must be calibrated."""

    kind: Literal["uncertainty"] = "uncertainty"
    name: str = "uncertainty"
    weight: FiniteFloat = -1.0
    """Factor on the standard deviation in the sum of components."""


class LengthPenalty(_Component):
    """Minus one for every token of the response beyond ``free_tokens``."""

    kind: Literal["length_penalty"] = "length_penalty"
    name: str = "length_penalty"
    free_tokens: NonNegativeInt = 0
    """Number of response tokens without a penalty."""


class RegexComponent(_Component):
    """One if the pattern is found in the response, else zero."""

    kind: Literal["regex"] = "regex"
    pattern: StrictStr
    """Regular expression of Python's re module."""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"is not a regular expression: {error}") from error
        return pattern


class PythonComponent(_Component):
    """The result of a function that the user wrote."""

    kind: Literal["python"] = "python"
    function: Annotated[StrictStr, Field(pattern=rf"^{COMPONENT_NAME}(\.{COMPONENT_NAME})*:{COMPONENT_NAME}$")]
    """MODULE:FUNCTION, importable by replicas. It is called with lists of prompts and responses and returns one number
    per response. Several threads may call it at once."""
    timeout_s: PositiveFloat = 60.0
    """Maximum duration of a call in seconds. A call that takes longer fails."""


Component: TypeAlias = Annotated[
    CriticComponent | UncertaintyComponent | LengthPenalty | RegexComponent | PythonComponent,
    Field(discriminator="kind"),
]


class Components(Section):
    """The components whose weighted sum is the reward."""

    components: tuple[Component, ...] = Field((CriticComponent(),), min_length=1)
    """Components whose weighted sum is the reward."""

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
    """Reads a YAML file with a list ``components``. Without a file, the critic is the only component.

    Raises:
        ConfigError: The file is wrong; the message names file, line and fault.
    """
    return (load_config_file(Components, path) if path else Components()).components


def with_pessimism(components: tuple[Component, ...], pessimism: float) -> tuple[Component, ...]:
    """Adds the uncertainty with the weight ``-pessimism``, unless that is 0.

    Raises:
        ConfigError: A component is the uncertainty already, or has its name.
    """
    if not pessimism:
        return components
    added = UncertaintyComponent(weight=-pessimism)
    for component in components:
        if component.name == added.name or isinstance(component, UncertaintyComponent):
            raise ConfigError(
                f"--pessimism adds the component {added.name!r}, and the file of components has {component.name!r} "
                "already: leave out one of them"
            )
    return (*components, added)


class ScoringOptions(AssumedEncoding):
    """Options of every scorer."""

    dtype: AutoDtype = "auto"
    """Dtype of parameters and activations. auto is bfloat16 on a GPU and float32 on a CPU. float32 on a GPU multiplies
    in TF32. Rewards are always float32."""
    normalize: bool = False
    """Normalise rewards to mean 0 and deviation 1 over the critic's reference responses."""
    token_budget: PositiveInt = 4096
    """Maximum number of tokens computed at once. Changes speed and memory only."""
    prefix_cache_bytes: NonNegativeInt = 2**30
    """Memory in bytes, of the device, for keys and values of prefixes that later calls can reuse. 0 turns it off."""


class ScoringJobOptions(ScoringOptions):
    """Options of every job that starts scorers."""

    components: PathOrUri | None = None
    """YAML file with the components of a reward; None uses the critic alone."""
    pessimism: NonNegativeFloat = 0.0
    """Standard deviations of the critic's reward to subtract from the reward, as the component uncertainty. 0 subtracts
    none. The critic must be calibrated."""

    def scorer_config(self, checkpoint: str, digest: str) -> ScorerConfig:
        """Returns the options of every scorer. A job without limits of a call has no other callers to limit.

        Raises:
            ConfigError: The file of components cannot be read, or a component is wrong.
        """
        return ScorerConfig(
            checkpoint=checkpoint,
            digest=digest,
            components=with_pessimism(load_components(self.components), self.pessimism),
            **self.model_dump(include=set(ScoringOptions.model_fields)),
            **{name: getattr(self, name, 2**31) for name in CallLimits.model_fields},
        )


class CallLimits(Section):
    """Limits of one call of a scorer."""

    max_items: PositiveInt = 1024
    """Maximum number of items per call; larger calls are rejected."""
    max_text_bytes: PositiveInt = 512 * 1024
    """Maximum number of bytes of an item's text; longer texts are rejected."""
    max_tokens: PositiveInt = 32768
    """Maximum number of tokens of an item's text; longer texts are rejected. Shorter texts that exceed the critic's own
    length limit are truncated from the left, as in training."""


class ScorerConfig(ScoringOptions, CallLimits, Components):
    """The critic and the options of one scorer."""

    checkpoint: ModelPath
    """Critic directory, or another reward model: a path, URI or hub id that every replica reaches."""
    digest: str | None = None
    """Expected SHA-256 of the critic's files; None accepts any."""


class ServeJobConfig(ScoringJobOptions, CallLimits):
    """Serves a critic's rewards from a pool of scorer replicas, or updates a running pool.

    For example: rlhf-critic serve runs/first/step-000100 --min-replicas 1 --max-replicas 8

    In a Ray cluster this command starts the pool and exits. Without a cluster it starts Ray locally and keeps running.
    To publish a new critic: rlhf-critic serve NEW --publish. To stop the pool: rlhf-critic serve --stop
    """

    checkpoint: tyro.conf.Positional[ModelPath | None] = None
    """Critic directory (a checkpoint of a run, or an export), or another reward model with one label, as transformers
    saves it. A path, URI or hub id."""
    publish: bool = False
    """Replace the critic of the running pool by CHECKPOINT and its encoding, and keep the pool's other options."""
    stop: bool = False
    """Stop the running pool."""
    app: str = "scorers"
    """Name of the pool, to which clients connect."""
    min_replicas: NonNegativeInt = 1
    """Minimum number of replicas. With 0, an idle pool scales to zero."""
    max_replicas: PositiveInt = 1
    """Maximum number of replicas."""
    shards: PositiveInt = 1
    """Devices per replica, over which ZeRO-3 shards a critic that is too large for one device."""
    cpus_per_shard: PositiveFloat = 1.0
    """CPUs that Ray reserves per shard; also its number of torch threads without a GPU."""
    use_gpu: bool = False
    """Use one GPU per shard."""
    target_ongoing_requests: PositiveFloat = 8.0
    """Target number of ongoing requests per replica: more add replicas, fewer remove them."""
    max_ongoing_requests: PositiveInt = 32
    """Maximum number of ongoing requests per replica: enough for a few micro-batches, so that a replica never idles and
    further requests can reach other replicas."""
    max_queued_requests: PositiveInt = 200
    """Maximum number of requests that wait at one caller; more are rejected and can be retried."""
    upscale_delay_s: NonNegativeFloat = 10.0
    """Seconds of high load before replicas are added."""
    downscale_delay_s: NonNegativeFloat = 300.0
    """Seconds of low load before replicas are removed."""
    host: str = "127.0.0.1"
    """Address on which HTTP listens."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port on which HTTP listens."""
    auth: Literal["auto", "on", "off"] = "auto"
    """Require a bearer token for HTTP; auto requires it everywhere except on loopback."""
    token_file: str = "~/.config/rlhf-critic/token"
    """File with the bearer token; created, readable by you alone, if it is missing."""
    max_body_bytes: PositiveInt = 16 * 1024 * 1024
    """Maximum number of bytes of an HTTP request's body."""
    deadline_s: PositiveFloat = 60.0
    """Seconds that an HTTP request waits for its scores."""
    collect: str | None = None
    """File to which the page's tab Judge appends preferences, for data.train of train: a path on the head node. None
    saves none."""
    start_timeout_s: PositiveFloat = 1800.0
    """Seconds to wait for replicas, including the time an autoscaler needs to add nodes."""

    @model_validator(mode="after")
    def _consistent(self) -> ServeJobConfig:
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas {self.max_replicas} is below min_replicas {self.min_replicas}")
        if self.stop and (self.checkpoint or self.publish):
            raise ValueError("--stop takes neither a checkpoint nor --publish")
        if not self.stop and not self.checkpoint:
            raise ValueError("a checkpoint is required: rlhf-critic serve CHECKPOINT")
        return self


class ScoreJobConfig(ScoringJobOptions):
    """Scores the responses of a data set with a critic, part by part. An interrupted job resumes when it runs again.

    For example: rlhf-critic score my-critic rollouts.jsonl scored --num-workers 2

    Rows have prompt and response, prompt and responses (a list), messages, text (finished) or token_ids. Other fields
    are passed through.
    """

    checkpoint: tyro.conf.Positional[ModelPath]
    """Critic directory (a checkpoint of a run, or an export), or another reward model with one label, as transformers
    saves it. A path, URI or hub id."""
    data: tyro.conf.Positional[Source]
    """Data to score: a file (.jsonl, .json, .parquet, .csv, each also .gz; path or URI), a directory from
    datasets' save_to_disk, or a hub id."""
    out: tyro.conf.Positional[PathOrUri]
    """Directory for the scored parts, new or of the same job. Every worker must reach it."""
    fields: dict[str, str] = Field({})
    """Field names of your data, each after this project's name: --fields response answer."""
    best_of_n: bool = False
    """Write only the best of a row's responses, as response; the first one of equals."""
    format: Literal["auto", "jsonl", "parquet"] = "auto"
    """Output format. auto: Parquet for Parquet input, otherwise JSON Lines."""
    rows_per_part: PositiveInt = 512
    """Number of rows per part, the unit that an interruption can lose."""
    num_workers: PositiveInt = 1
    """Number of scorers, each an actor with the full critic."""
    cpus_per_worker: PositiveFloat = 1.0
    """CPUs that Ray reserves per scorer; also its number of torch threads without a GPU."""
    use_gpu: bool = False
    """Use one GPU per scorer."""
    start_timeout_s: PositiveFloat = 1800.0
    """Seconds to wait for scorers, including the time an autoscaler needs to add nodes."""
