"""Options of ``rlhf-critic train``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from rlhf_critic.config.base import Decay, NonNegativeFloat, NonNegativeInt, PathOrUri, RunName, Section, Sources
from rlhf_critic.config.model import EncodingConfig, ModelConfig, OptimizerConfig
from rlhf_critic.errors import ConfigError


class DataConfig(Section):
    """Sources of preferences for training and validation."""

    train: Sources = ()
    """Training data (required), preferences or rows with score, label or steps: one or more files (.jsonl, .json,
    .parquet, .csv, each also .gz; paths or URIs), directories from datasets' save_to_disk, or hub ids. The last two
    take an optional :SPLIT."""
    train_weights: tuple[NonNegativeFloat, ...] | None = None
    """How often an epoch shows the preferences of each source of data.train; None shows each once."""
    mixing_temperature: PositiveFloat = 1.0
    """Temperature T of the mixture of data.train: an epoch, of the same length, shows each source with a share
    proportional to its number of rows to the power of 1/T. 1 shows each row once; higher values favour small sources,
    whose rows are repeated. Excludes data.train_weights."""
    validation: Sources = ()
    """Validation preferences: sources as in data.train. Without any, validation is skipped."""
    validation_fraction: Decay = 0.0
    """Fraction of the prompts to hold out for validation, with all their preferences; an alternative to
    data.validation."""
    fields: dict[str, str] = Field({})
    """Field names of your data, each after this project's name: --data.fields prompt instruction chosen output_1."""
    overlong: Literal["truncate", "skip"] = "truncate"
    """Treatment of preferences with a side over encoding.max_length: truncate from the left, or skip. Both are counted
    and reported."""
    deduplicate: bool = False
    """Leave out rows that repeat an earlier one of any source of data.train: the same token ids in the same order with
    the same targets. They are counted for each source."""
    decontaminate: Sources = ()
    """Benchmarks whose texts must not be trained on: sources with rows of training data, best-of-n rows, prompts, or
    rows with text. Rows that share an n-gram of words with them are left out and counted for each source."""
    decontaminate_ngram: PositiveInt = 13
    """Number of consecutive words that a row and a benchmark must share. A shorter text of a benchmark only matches a
    whole prompt, response or conversation."""
    seed: NonNegativeInt = 0
    """Random seed that selects the held-out prompts, and the preferences of a source that is shown in part."""
    cache_dir: PathOrUri = ".cache"
    """Local cache directory for encoded data. Safe to delete."""

    @model_validator(mode="after")
    def _consistent(self) -> DataConfig:
        if self.train_weights is not None and (
            len(self.train_weights) != len(self.train) or not any(self.train_weights)
        ):
            raise ValueError("data.train_weights needs one weight for each source of data.train, not all 0")
        if self.train_weights is not None and self.mixing_temperature != 1:
            raise ValueError("data.train_weights and data.mixing_temperature exclude each other; give one of them")
        if self.validation and self.validation_fraction:
            raise ValueError("data.validation and data.validation_fraction exclude each other; give one of them")
        return self


class TrainConfig(OptimizerConfig):
    """Optimization of the critic: batches, loss and schedule of checkpoints."""

    global_batch_size: PositiveInt = 64
    """Preferences per optimizer step, summed over all ranks."""
    epochs: PositiveFloat = 1.0
    """Number of passes over the preferences; may be a fraction."""
    max_steps: PositiveInt | None = None
    """Maximum number of optimizer steps; None leaves it to train.epochs."""
    loss: Literal["sequence", "per_token"] = "sequence"
    """Loss function. sequence compares rewards (Bradley-Terry; Plackett-Luce for rankings); per_token compares values
    at every token after the common prefix of a pair, as DeepSpeed-Chat does."""
    margin_scale: NonNegativeFloat = 0.0
    """Factor on a preference's margin, by which the chosen reward must win; 0 ignores margins."""
    centering_coefficient: NonNegativeFloat = 0.0
    """Weight of the squared sum of a preference's rewards, which keeps rewards near 0; TRL suggests 0.01."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Label smoothing: assumed probability that a preference label is flipped."""
    score_weight: NonNegativeFloat = 1.0
    """Weight of the squared error of a row with a rating (score), beside preferences with weight 1."""
    label_weight: NonNegativeFloat = 1.0
    """Weight of the cross-entropy of a row with an outcome (label), beside preferences with weight 1."""
    steps_weight: NonNegativeFloat = 1.0
    """Weight of the mean cross-entropy of a row with labelled steps, beside preferences with weight 1."""
    router_loss_coefficient: NonNegativeFloat = 0.0
    """Weight of the load-balancing loss of a mixture of experts, per sequence; transformers uses 0.001 to 0.02. 0 keeps
    the routers free. Only training on preferences uses it."""
    early_stopping_patience: NonNegativeInt = 0
    """Stop after this many consecutive validations without a lower log-loss; 0 never stops early."""
    reference: Literal["validation", "train"] = "validation"
    """Responses whose rewards give critic.json its mean and standard deviation. validation uses the validation data at
    every evaluation; train uses up to 1,000 training preferences at the end."""
    uncertainty: bool = True
    """Calibrate the last checkpoint, so that scorers can answer a standard deviation with each reward. Needs 20 or
    more validation preferences, and does nothing without. Costs at most 4 % of the run's computation."""
    seed: NonNegativeInt = 0
    """Random seed for data order, head and adapter initialisation, and dropout."""
    validate_every: NonNegativeInt = 0
    """Optimizer steps between validations; 0 validates at the end only."""
    checkpoint_every: NonNegativeInt = 100
    """Optimizer steps between checkpoints; 0 saves at the end only."""

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if self.loss == "per_token" and self.margin_scale:
            raise ValueError("train.margin_scale is defined for train.loss sequence only; with per_token set it to 0")
        if self.early_stopping_patience and not self.validate_every:
            raise ValueError("train.early_stopping_patience counts validations; set train.validate_every above 0")
        return self


class RunConfig(Section):
    """Name, storage, hardware and checkpoints of the run."""

    name: RunName = "critic"
    """Name of the run. Its directory is STORAGE_PATH/NAME."""
    storage_path: PathOrUri = "runs"
    """Directory of all runs: a local path, shared path or URI (s3://, gs://)."""
    num_workers: PositiveInt = 1
    """Number of Ray Train workers, each with one shard of the critic. A resumed run may have another number."""
    min_workers: PositiveInt | None = None
    """Minimum number of workers after nodes are lost (elastic training); the group grows up to num_workers again. Each
    change restarts from the last checkpoint. Use it only on nodes without other work, because Ray Train counts all
    resources of a node as free. None keeps num_workers."""
    use_gpu: bool = False
    """Use one GPU per worker and NCCL, instead of CPUs and Gloo."""
    deterministic: bool = False
    """Use kernels and collectives that repeat their results, so that a repeated run on the same GPUs gives the same
    weights. A CPU needs no such option."""
    cpus_per_worker: PositiveInt = 1
    """CPUs that Ray reserves per worker; also its number of torch threads without a GPU."""
    max_failures: NonNegativeInt = 3
    """Maximum number of times that lost workers are replaced before the job fails."""
    keep_checkpoints: PositiveInt = 2
    """Number of checkpoints to keep in the run's directory."""
    keep: Literal["newest", "best"] = "newest"
    """Checkpoints to keep. newest keeps the newest ones; best keeps those with the lowest validation log-loss and the
    newest one, and validates at every checkpoint."""
    wandb_project: str | None = None
    """Project of Weights & Biases that also receives the history; needs the wandb package."""
    start_timeout_s: PositiveFloat = 1800.0
    """Seconds to wait for workers to be placed, including the time an autoscaler needs to add nodes."""

    @model_validator(mode="after")
    def _minimum_and_maximum(self) -> RunConfig:
        if self.min_workers is not None and self.min_workers > self.num_workers:
            raise ValueError("run.min_workers is greater than run.num_workers")
        return self


class TrainJobConfig(Section):
    """Trains a critic on preferences with Ray Train and DeepSpeed.

    For example: rlhf-critic train --model.path MODEL --data.train prefs.jsonl --run.num-workers 2
    """

    model: ModelConfig = ModelConfig()
    encoding: EncodingConfig = EncodingConfig()
    data: DataConfig = Field(default_factory=DataConfig)
    train: TrainConfig = TrainConfig()
    run: RunConfig = Field(default_factory=RunConfig)
    resume: bool = False
    """Resume the run of this name from its last checkpoint."""
    seeds: tuple[NonNegativeInt, ...] = ()
    """Train once with each of these seeds, in runs NAME-seed-N, and compare. Empty uses train.seed alone."""
    dry_run: bool = False
    """Print the plan (steps, tokens, memory per shard) without training."""

    @field_validator("seeds")
    @classmethod
    def _different_seeds(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("names a seed twice; both runs would be the same")
        return seeds

    def resolved(self) -> TrainJobConfig:
        """Returns these options with the dtype that auto stands for on the device of this run."""
        return self.model_copy(update={"model": self.model.resolved(self.run.use_gpu)})

    def validate_complete(self) -> None:
        """Checks options that have no default.

        Raises:
            ConfigError: A required option is missing; the message names it.
        """
        for option, value in (("model.path", self.model.path), ("data.train", self.data.train)):
            if not value:
                raise ConfigError(f"{option} is required: give --{option} VALUE, or set it in the --config file")
        validates = self.data.validation or self.data.validation_fraction
        for option, wanted in (
            ("train.early_stopping_patience", self.train.early_stopping_patience > 0),
            ("run.keep best", self.run.keep == "best"),
        ):
            if wanted and not validates:
                raise ConfigError(
                    f"{option} needs data to validate on; give --data.validation or --data.validation-fraction"
                )
