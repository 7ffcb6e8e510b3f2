"""Every option of the project: typed, documented with its unit, validated; from a YAML file and the command line.

A config file has the sections below as its top-level keys. On the command line the same options are dotted
(``--train.learning-rate 1e-5``) and win over the file. Knows nothing of what the options do.
"""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro
import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from rlhf_critic.errors import ConfigError

NonNegativeFloat = Annotated[float, Field(ge=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
# What chat_template may be beside a file; these words are never one, though there may be files of that name.
AUTO_TEMPLATE = "auto"
PLAIN_TEMPLATE_NAME = "plain"
# USER:PASSWORD@ of any URI, and what Arrow's file systems take as parameters.
SECRET_IN_URI = re.compile(
    r"^(?:(?:https?|ftp)://[^/?#\s]*:[^/?#\s]*@"  # and not HOST:PORT/PATH@
    r"|(?!https?:|ftp:)[A-Za-z][A-Za-z0-9+.-]*://[^/?#\s]*:[^?#\s]*@"  # a key that nobody quoted may have a slash
    r"|[A-Za-z][A-Za-z0-9+.-]*://.*[?&](?:access|secret)_key=)"
)


class Section(BaseModel):
    """Options that belong together: unknown names, NaN and infinity are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _no_secret(cls, value: Any, info: ValidationInfo) -> Any:
        """Options are written into checkpoints, histories and logs, so no secret may be among them."""
        texts = value if isinstance(value, tuple) else value.values() if isinstance(value, dict) else (value,)
        if any(isinstance(text, str) and SECRET_IN_URI.search(text) for text in texts):
            # Not a ValueError, with which pydantic would show the value.
            raise ConfigError(
                f"{info.field_name}: a URI with a password or key in it, which would be written into checkpoints and "
                "logs: leave it out, and give it by the environment, as the storage's own tools take it "
                "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for s3://)"
            )
        return value


class BodyConfig(Section):
    """A base model and how much of it is used."""

    path: str = Field("", description="Base model: a Hugging Face directory or hub id (required).")
    num_layers: PositiveInt | None = Field(None, description="Keep only the first layers of the body; None keeps all.")
    freeze_layers: NonNegativeInt = Field(
        0, description="Leave the embeddings and this many of the first layers as they are; 0 trains everything."
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="Of parameters and activations. Values, rewards and log-probabilities are float32 all the same.",
    )
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2"] = Field(
        "auto",
        description="Attention kernel of transformers; auto is sdpa where the family has it, else eager. "
        "flash_attention_2 needs a GPU and its own package, and runs padded batches.",
    )
    prefix_tree: bool = Field(
        True, description="Compute what sequences share at their beginning once; off pads instead. Same results."
    )


class ModelConfig(BodyConfig):
    """The base model and how the critic is made of it."""

    head_init: Literal["normal", "zero"] = Field("normal", description="New head: N(0, 1/sqrt(hidden + 1)) or zero.")
    disable_dropout: bool = Field(True, description="Set every dropout probability to 0, as rewards want.")
    lora_rank: NonNegativeInt = Field(
        0,
        description="Fit low-rank adapters of this rank and the head instead of all weights (needs peft: "
        "rlhf-critic[lora]); checkpoints hold the merged weights. 0 is off.",
    )
    lora_alpha: PositiveFloat = Field(16.0, description="Adapters are scaled by this over their rank.")
    lora_dropout: Decay = Field(0.0, description="Dropout of what goes into adapters.")
    lora_target_modules: tuple[str, ...] = Field(
        (), description="Names of the modules that get adapters, such as q_proj v_proj; none means all linear layers."
    )


class EncodingConfig(Section):
    """How a prompt and a response become token ids."""

    chat_template: str = Field(
        "auto",
        description="'auto' (the tokenizer's own, else plain), 'plain' (prompt, response, EOS) or the path of a Jinja "
        "file.",
    )
    max_length: PositiveInt = Field(1024, description="Most tokens of a sequence; longer ones lose their beginning.")


class DataConfig(Section):
    """Where preferences come from."""

    train: tuple[str, ...] = Field(
        (),
        description="Preferences to fit: one or more files (.jsonl, .json, .parquet, .csv, each also .gz; paths or "
        "URIs), directories that datasets saved, or hub ids, the last two with an optional :SPLIT (required).",
    )
    train_weights: tuple[NonNegativeFloat, ...] | None = Field(
        None,
        description="For each source of data.train, how often an epoch shows its preferences; None shows each once.",
    )
    validation: tuple[str, ...] = Field((), description="Preferences to validate on, likewise; none skips validation.")
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
    cache_dir: str = Field(".cache", description="Local directory for encoded data. Safe to delete.")

    @field_validator("train", "validation", mode="before")
    @classmethod
    def _one_is_a_list_of_one(cls, sources: Any) -> Any:
        return (sources,) if isinstance(sources, str) else () if sources is None else sources

    @field_validator("train", "validation")
    @classmethod
    def _each_once(cls, sources: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(sources)) < len(sources):
            raise ValueError("names a source twice: to show it more often, give it a weight in data.train_weights")
        return sources

    @model_validator(mode="after")
    def _consistent(self) -> DataConfig:
        if self.train_weights is not None and (
            len(self.train_weights) != len(self.train) or not any(self.train_weights)
        ):
            raise ValueError("data.train_weights needs one weight for each source of data.train, not all 0")
        if self.validation and self.validation_fraction:
            raise ValueError("data.validation and data.validation_fraction: give one or the other")
        return self


class OptimizerConfig(Section):
    """AdamW, its schedule and how DeepSpeed shards them."""

    learning_rate: PositiveFloat = Field(1e-5, description="Peak learning rate of AdamW.")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="Learning rate after warm-up.")
    warmup_fraction: Fraction = Field(0.05, description="Fraction of all steps over which the rate rises from 0.")
    weight_decay: NonNegativeFloat = Field(0.0, description="AdamW's decoupled decay, on matrices only.")
    adam_beta1: Decay = Field(0.9, description="AdamW's decay of the first moment.")
    adam_beta2: Decay = Field(0.95, description="AdamW's decay of the second moment.")
    adam_epsilon: PositiveFloat = Field(1e-8, description="AdamW's denominator offset.")
    max_grad_norm: NonNegativeFloat = Field(1.0, description="Clip the global gradient norm here; 0 does not clip.")
    token_budget: PositiveInt | Literal["auto"] = Field(
        "auto",
        description="Most tokens computed for a micro-batch; auto measures a few sizes at the start. Changes speed and "
        "memory; results only by rounding.",
    )
    gradient_checkpointing: bool = Field(
        False,
        description="Compute activations again in the backward pass instead of keeping them: less memory, slower.",
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(
        2, description="What DeepSpeed shards: 0 nothing, 1 optimizer state, 2 also gradients, 3 also parameters."
    )
    offload_optimizer: bool = Field(
        False, description="Keep the optimizer's state in the memory of the CPUs; needs zero_stage 1 to 3."
    )
    offload_parameters: bool = Field(
        False, description="Keep parameters in the memory of the CPUs until they are used; needs zero_stage 3."
    )

    @model_validator(mode="after")
    def _offload_needs_shards(self) -> OptimizerConfig:
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer needs zero_stage 1, 2 or 3")
        if self.offload_parameters and self.zero_stage != 3:
            raise ValueError("offload_parameters needs zero_stage 3")
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

    name: str = Field("critic", description="Name of the run; its directory is STORAGE_PATH/NAME.")
    storage_path: str = Field("runs", description="Local path, shared path or URI (s3://, gs://) for checkpoints.")
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

    @field_validator("name")
    @classmethod
    def _one_path_component(cls, name: str) -> str:
        if not name or name in {".", ".."} or any(character in name for character in "/\\"):
            raise ValueError("must be a single directory name")
        return name

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
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    run: RunConfig = RunConfig()
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

    def require_complete(self) -> None:
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


class InspectJobConfig(Section):
    """Reads preferences as a training job would, counts what is in them and shows some as the critic will see them.

    For example: python -m jobs.inspect prefs.jsonl --model MODEL
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


ConfigT = TypeVar("ConfigT", bound=BaseModel)


def parse_command_line(config_class: type[ConfigT], arguments: Sequence[str] | None = None, prog: str = "") -> ConfigT:
    """Reads ``--config FILE.yaml`` and dotted options into a config; options win over the file.

    Args:
        config_class: A pydantic model of sections and options.
        arguments: Default: the command line of this process.
        prog: The command as a user types it, for ``--help``.

    Raises:
        ConfigError: The file cannot be read, or an option in it is unknown or out of range.
        SystemExit: tyro's, for a wrong command line (exit code 2) or ``--help``.
    """
    only_config = argparse.ArgumentParser(prog=prog, add_help=False, allow_abbrev=False)
    only_config.add_argument("--config", metavar="FILE.yaml")
    known, remaining = only_config.parse_known_args(arguments)
    purpose = inspect.cleandoc(config_class.__doc__ or "")
    return tyro.cli(
        config_class,
        args=remaining,
        default=load_config_file(config_class, known.config) if known.config else tyro.MISSING_NONPROP,
        prog=prog or None,
        description=f"{purpose}\n\n--config FILE.yaml sets options from a file; those given here win.",
    )


def load_config_file(config_class: type[ConfigT], path: str) -> ConfigT:
    """Reads and validates a YAML config file.

    Raises:
        ConfigError: Names the file, the line and the option at fault.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        content = yaml.safe_load(text) or {}
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a YAML file: {error}") from error
    try:
        return config_class.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        line = _line_of(tree, first["loc"])
        option = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ConfigError(f"{path}:{line}: {option}: {first['msg']} (got {first['input']!r})") from error


def _line_of(tree: yaml.Node | None, location: tuple[Any, ...]) -> int:
    """The line (from 1) of the deepest key or entry of a list of ``location`` that the file has."""
    line, node = 1, tree
    for part in location:
        if isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
        elif isinstance(node, yaml.MappingNode):
            # A part that is no key is pydantic's word for the member of a union that was tried.
            for key, value in node.value:
                if key.value == part:
                    line, node = key.start_mark.line + 1, value
                    break
    return line
