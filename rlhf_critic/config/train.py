"""Options of ``jobs.train``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    Field,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from rlhf_critic.config.base import (
    Decay,
    NonNegativeFloat,
    NonNegativeInt,
    PathOrUri,
    RunName,
    Section,
    Sources,
)
from rlhf_critic.config.model import EncodingConfig, ModelConfig, OptimizerConfig
from rlhf_critic.errors import ConfigError


class DataConfig(Section):
    """Where preferences come from."""

    train: Sources = Field(
        (),
        description="Preferences to fit: one or more files (.jsonl, .json, .parquet, .csv, each also .gz; paths or "
        "URIs), directories that datasets saved, or hub ids, the last two with an optional :SPLIT (required).",
    )
    train_weights: tuple[NonNegativeFloat, ...] | None = Field(
        None,
        description="For each source of data.train, how often an epoch shows its preferences; None shows each once.",
    )
    validation: Sources = Field((), description="Preferences to validate on, likewise; none skips validation.")
    validation_fraction: Decay = Field(
        0.0,
        description="Instead of data.validation: hold out this fraction of the prompts, with all that is said of them.",
    )
    fields: dict[str, str] = Field(
        {},
        description="Other field names in the data, ours to theirs: --data.fields prompt instruction chosen output_1.",
    )
    overlong: Literal["truncate", "skip"] = Field(
        "truncate",
        description="What becomes of a preference with a side over encoding.max_length: it loses its beginning, or is "
        "left out. Both are counted and reported.",
    )
    seed: NonNegativeInt = Field(
        0, description="Of what is drawn from the data: the prompts held out, the part of a source with a weight."
    )
    cache_dir: PathOrUri = Field(".cache", description="Local directory for encoded data. Safe to delete.")

    @model_validator(mode="after")
    def _consistent(self) -> DataConfig:
        if self.train_weights is not None and (
            len(self.train_weights) != len(self.train) or not any(self.train_weights)
        ):
            raise ValueError("data.train_weights needs one weight for each source of data.train, not all 0")
        if self.validation and self.validation_fraction:
            raise ValueError("data.validation and data.validation_fraction: give one or the other")
        return self


class TrainConfig(OptimizerConfig):
    """The optimization."""

    global_batch_size: PositiveInt = Field(64, description="Preferences per optimizer step, over all ranks together.")
    epochs: PositiveFloat = Field(1.0, description="How often each preference is seen; fractions are fine.")
    max_steps: PositiveInt | None = Field(
        None, description="Stop after this many optimizer steps, whatever epochs say."
    )
    loss: Literal["sequence", "per_token"] = Field(
        "sequence",
        description="sequence compares rewards (Bradley-Terry; Plackett-Luce for rankings); per_token compares values "
        "at every token from where a pair parts, as DeepSpeed-Chat does.",
    )
    margin_scale: NonNegativeFloat = Field(
        0.0, description="The chosen reward must win by this times the preference's margin; 0 leaves margins out."
    )
    centering_coefficient: NonNegativeFloat = Field(
        0.0,
        description="Weight of the squared sum of a preference's rewards, which keeps them near 0; TRL suggests 0.01.",
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        0.0, description="The share of judgements taken to be the wrong way round."
    )
    early_stopping_patience: NonNegativeInt = Field(
        0, description="Stop after this many validations in a row without a lower log-loss; 0 goes on to the end."
    )
    reference: Literal["validation", "train"] = Field(
        "validation",
        description="The responses whose rewards give critic.json its mean and standard deviation: of the validation "
        "data whenever it is evaluated, or of up to 1,000 training preferences at the end.",
    )
    seed: NonNegativeInt = Field(0, description="Of data order, a new head, adapters and dropout.")
    validate_every: NonNegativeInt = Field(0, description="Steps between validations; 0 validates at the end only.")
    checkpoint_every: NonNegativeInt = Field(100, description="Steps between checkpoints; 0 saves at the end only.")

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if self.loss == "per_token" and self.margin_scale:
            raise ValueError("train.margin_scale is defined for train.loss sequence, not for per_token: set it to 0")
        if self.early_stopping_patience and not self.validate_every:
            raise ValueError("train.early_stopping_patience needs train.validate_every: validations to count")
        return self


class RunConfig(Section):
    """Where and on what the job runs."""

    name: RunName = Field("critic", description="Name of the run; its directory is STORAGE_PATH/NAME.")
    storage_path: PathOrUri = Field(
        "runs", description="Local path, shared path or URI (s3://, gs://) for checkpoints."
    )
    num_workers: PositiveInt = Field(
        1,
        description="Ray Train workers, each holding one shard of the critic; a resumed run may have another number.",
    )
    min_workers: PositiveInt | None = Field(
        None,
        description="Fewest workers to go on with when nodes go; up to num_workers when they come (Ray Train's elastic "
        "training). Each change goes back to the last checkpoint. Only where nothing else uses those nodes: Ray Train "
        "counts what they have, not what is free. None keeps num_workers.",
    )
    use_gpu: bool = Field(False, description="One GPU per worker and NCCL, instead of CPUs and Gloo.")
    cpus_per_worker: PositiveInt = Field(
        1, description="CPUs that Ray reserves per worker, and torch threads if no GPU."
    )
    max_failures: NonNegativeInt = Field(3, description="How often lost workers are replaced before the job gives up.")
    keep_checkpoints: PositiveInt = Field(2, description="How many checkpoints the run's directory keeps.")
    keep: Literal["newest", "best"] = Field(
        "newest",
        description="Which: the newest; or those with the lowest validation log-loss and, beside them, the newest. "
        "best validates at every checkpoint.",
    )
    wandb_project: str | None = Field(
        None, description="Send the history to this project of Weights & Biases too; needs the wandb package."
    )
    start_timeout_s: PositiveFloat = Field(
        1800.0, description="Seconds to wait for workers to be placed (an autoscaler may have to add nodes)."
    )

    @model_validator(mode="after")
    def _fewest_and_most(self) -> RunConfig:
        if self.min_workers is not None and self.min_workers > self.num_workers:
            raise ValueError("run.min_workers is more than run.num_workers")
        return self


class TrainJobConfig(Section):
    """Fits a critic to preferences with Ray Train and DeepSpeed.

    For example: python -m jobs.train --model.path MODEL --data.train prefs.jsonl --run.num-workers 2
    """

    model: ModelConfig = ModelConfig()
    encoding: EncodingConfig = EncodingConfig()
    data: DataConfig = Field(default_factory=DataConfig)
    train: TrainConfig = TrainConfig()
    run: RunConfig = Field(default_factory=RunConfig)
    resume: bool = Field(False, description="Continue the run of this name from its last checkpoint.")
    seeds: tuple[NonNegativeInt, ...] = Field(
        (), description="Fit once with each of these seeds, in runs NAME-seed-N, and compare; none: train.seed alone."
    )
    dry_run: bool = Field(False, description="Print the plan (steps, tokens, memory of a shard) and stop.")

    @field_validator("seeds")
    @classmethod
    def _different_seeds(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("names a seed twice: both runs would be the same")
        return seeds

    def validate_complete(self) -> None:
        """Checks what has no default.

        Raises:
            ConfigError: Names the option that is missing.
        """
        required: tuple[tuple[str, object], ...] = (("model.path", self.model.path), ("data.train", self.data.train))
        for option, value in required:
            if not value:
                flag = option.replace("_", "-")
                raise ConfigError(f"{option} is required: give --{flag} VALUE, or set it in the --config file")
        validates = self.data.validation or self.data.validation_fraction
        for option, wanted in (
            ("train.early_stopping_patience", self.train.early_stopping_patience > 0),
            ("run.keep best", self.run.keep == "best"),
        ):
            if wanted and not validates:
                raise ConfigError(f"{option} needs data to validate on: give --data.validation or a fraction of it")
