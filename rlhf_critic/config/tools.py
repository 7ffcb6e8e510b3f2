"""Options of ``rlhf-critic inspect``, ``evaluate``, ``export`` and ``plan``."""

from __future__ import annotations

from typing import Annotated, Literal

import tyro
from pydantic import Field, PositiveFloat, PositiveInt

from rlhf_critic.config.base import ModelPath, NonNegativeInt, PathOrUri, Section, Sources
from rlhf_critic.config.model import (
    AssumedEncoding,
    AutoDtype,
    ChatTemplate,
    Dtype,
    EncodingConfig,
    OptimizerConfig,
    ShardingConfig,
    TemplateDate,
)

SOURCE_KINDS = (
    "a file (.jsonl, .json, .parquet, .csv, each also .gz; path or URI), "
    "a directory from datasets' save_to_disk, or a hub id"
)


class InspectJobConfig(Section):
    """Reads preferences as a training job would, counts them and shows some as the critic sees them.

    For example: rlhf-critic inspect prefs.jsonl --model MODEL
    """

    data: tyro.conf.Positional[tuple[str, ...]] = Field(
        min_length=1, description=f"One or more sources of preferences, each {SOURCE_KINDS}."
    )
    model: str
    """Model whose tokenizer encodes the preferences: a directory or hub id."""
    encoding: EncodingConfig = EncodingConfig()
    fields: dict[str, str] = Field({})
    """Field names of your data, each after this project's name: --fields prompt instruction chosen output_1."""
    overlong: Literal["truncate", "skip"] = "truncate"
    """Treatment of preferences with a side over encoding.max_length: truncate from the left, or skip."""
    decontaminate: Sources = ()
    """Benchmarks: rows that share an n-gram of words with them are left out and counted."""
    decontaminate_ngram: PositiveInt = 13
    """Number of consecutive words that a row and a benchmark must share."""
    examples: NonNegativeInt = 3
    """Number of preferences to show of each source, evenly spaced."""
    report: str | None = None
    """New or empty local directory for metrics.json and report.html, one page with statistics, lengths and examples."""
    cache_dir: PathOrUri = ".cache"
    """Local cache directory for encoded data. Safe to delete."""


class EvaluateJobConfig(AssumedEncoding):
    """Scores preferences, best-of-n rows or rows with targets, and measures the accuracy. Runs locally, without Ray.

    For example: rlhf-critic evaluate runs/first/step-000100 heldout.jsonl --report report
    """

    checkpoint: tyro.conf.Positional[ModelPath]
    """Critic directory (a checkpoint of a run, or an export), or another reward model with one label, as transformers
    saves it. A path, URI or hub id."""
    data: tyro.conf.Positional[str] = Field(
        description=f"Preferences, best-of-n rows or rows with targets: {SOURCE_KINDS}."
    )
    use_gpu: bool = False
    """Compute on one GPU instead of CPUs."""
    dtype: AutoDtype = "auto"
    """Dtype of parameters and activations. auto is bfloat16 on a GPU and float32 on a CPU. float32 on a GPU multiplies
    in TF32. Rewards are always float32."""
    token_budget: PositiveInt = 4096
    """Maximum number of tokens computed at once. Changes speed and memory only."""
    cache_dir: PathOrUri = ".cache"
    """Local cache directory for encoded data. Safe to delete."""
    json_output: bool = False
    """Print one JSON object instead of a table."""
    report: str | None = None
    """New or empty local directory for metrics.json and report.html, one page with plots. For preferences, the report
    also measures how rewards change with the form of an answer."""
    benchmark: Literal["rewardbench", "rewardbench2"] | None = None
    """Benchmark of whose public layout DATA is. The totals are those of the benchmark's own code."""
    against: ModelPath | None = None
    """Another critic or reward model to compare with on the same preferences."""
    other_domain: str | None = None
    """Preferences of another domain, a source as DATA. Their uncertainty is compared with that of DATA. The critic must
    be calibrated."""


class CalibrateJobConfig(AssumedEncoding):
    """Fits the uncertainty of a critic's rewards to preferences, and stores it beside the weights. Runs without Ray.

    For example: rlhf-critic calibrate my-critic prefs.jsonl --validation heldout.jsonl
    """

    checkpoint: tyro.conf.Positional[str]
    """Local directory of a critic (a checkpoint or an export), or of another reward model with one label."""
    data: tyro.conf.Positional[str] = Field(description=f"Preferences like those of training: {SOURCE_KINDS}.")
    validation: str | None = None
    """Preferences that the critic was not trained on, a source as DATA. They choose prior and temperature. None holds
    out a part of DATA, which must then be new to the critic."""
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Fraction of DATA's prompts to hold out, without validation."""
    max_preferences: PositiveInt = 10_000
    """Maximum number of preferences of DATA to read; more are sampled."""
    use_gpu: bool = False
    """Compute on one GPU instead of CPUs."""
    dtype: AutoDtype = "auto"
    """Dtype of parameters and activations. auto is bfloat16 on a GPU and float32 on a CPU."""
    token_budget: PositiveInt = 4096
    """Maximum number of tokens computed at once. Changes speed and memory only."""
    cache_dir: PathOrUri = ".cache"
    """Local cache directory for encoded data. Safe to delete."""


class AverageJobConfig(Section):
    """Averages the weights of two or more critics that were trained from one base model with one encoding.

    For example: rlhf-critic average runs/a/step-000100 runs/b/step-000100 runs/c/step-000100 averaged
    """

    paths: tyro.conf.Positional[tuple[str, ...]] = Field(
        min_length=3, description="Critic directories (paths or URIs), and last the new directory."
    )


SourceFormat = Literal[
    "auto",
    "deepspeed-chat",
    "trlx",
    "article",
    "openrlhf-critic",
    "llama-factory",
    "trl-value-head",
    "native",
    "two-labels",
]


class ExportJobConfig(Section):
    """Copies a critic out of a run, without its resume state, or converts another system's reward model.

    For example: rlhf-critic export deepspeed-chat-output my-critic --base facebook/opt-350m
    """

    checkpoint: tyro.conf.Positional[ModelPath]
    """Critic directory, such as a checkpoint of a run, or another system's reward model, or adapters of peft. A path,
    URI or hub id."""
    out: tyro.conf.Positional[str]
    """New directory for the exported critic."""
    auto_map: bool = False
    """Add a modeling file, so that trust_remote_code=True gives a value at every token as well."""
    source_format: Annotated[SourceFormat, tyro.conf.arg(name="from")] = "auto"
    """Format of the weights. auto copies a directory with critic.json and recognises other formats by their keys.
    native is a sequence-classification model, such as those of TRL and OpenRLHF. two-labels is one with two outputs,
    such as a process reward model; its reward is the log-odds of label 1, and auto never chooses it."""
    base: str | None = None
    """Base model, a directory or hub id, for a config or tokenizer that the checkpoint lacks, or to merge adapters of
    peft into. Only for another system's checkpoint."""
    max_length: PositiveInt | None = None
    """Maximum sequence length in tokens, by default the limit of a native model, else at most 1024. Only for another
    system's checkpoint."""
    chat_template: ChatTemplate | None = None
    """Chat template: auto, plain, openrlhf, openrlhf-plain, article or the path of a Jinja file; by default that of the
    other system. Only for another system's checkpoint."""
    template_date: TemplateDate | None = None
    """Date for a chat template that asks for the current one: fixed (the default) or today, as in training. Only for
    another system's checkpoint."""
    head_bias: Literal["refuse", "reward-mean"] = "refuse"
    """Treatment of a head's bias, which a critic does not have: reject it, or store it in critic.json as bias and as
    negative reward mean. The other system's score is the reward plus the bias. Only for another system's checkpoint."""


GpuName = Literal["a10g", "l4", "l40s", "a100-40g", "a100-80g", "h100", "h200"]
SizeNames = "0.1B, 0.5B, 1B, 3B, 8B, 14B, 32B, 70B"


class PlanJobConfig(ShardingConfig):
    """Estimates the memory of a critic's shard in training, and suggests options that make it fit a GPU.

    For example, 8B on two nodes of 8 GPUs:
    rlhf-critic plan --model 8B --world-size 16 --zero-stage 3 --gradient-checkpointing --cluster cluster/gcp.yaml
    """

    model: str = Field(
        "8B", description=f"Model size ({SizeNames}), or a config.json, model directory or hub id; needs no weights."
    )
    world_size: PositiveInt = 8
    """Number of ranks with one GPU each, as run.num_workers in training."""
    dtype: Dtype = "bfloat16"
    """Dtype of parameters and activations."""
    token_budget: PositiveInt = 4096
    """Maximum number of tokens computed per micro-batch."""
    max_length: PositiveInt = 1024
    """Maximum sequence length in tokens."""
    freeze_layers: NonNegativeInt = 0
    """Number of first layers that stay frozen, with the embeddings."""
    lora_rank: NonNegativeInt = 0
    """Rank of low-rank adapters; 0 trains all weights."""
    gpu: GpuName = "a100-80g"
    """GPU model of each rank."""
    cluster: str | None = None
    """Cluster YAML for `ray up`, such as cluster/aws.yaml, to count the nodes of each group with GPUs. Assumes that
    they have the GPU of --gpu."""
    tokens_per_step: PositiveInt = 65_536
    """Tokens per global batch, counted as `tokens` in a run's history."""
    tokens_per_second: PositiveFloat | None = None
    """Measured tokens per second of one GPU, for the time of a step: `tokens_per_second` in a run's
    history/metrics.jsonl, divided by its workers."""
    utilisation: Annotated[float, Field(gt=0, le=1)] = 0.35
    """Assumed fraction of the GPU's peak that computes the model, without tokens_per_second."""
    json_output: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print one JSON object, in bytes and seconds, instead of a table."""

    @property
    def optimizer(self) -> OptimizerConfig:
        """The options of the optimizer that decide memory."""
        return OptimizerConfig(**self.model_dump(include={"token_budget", *ShardingConfig.model_fields}))
