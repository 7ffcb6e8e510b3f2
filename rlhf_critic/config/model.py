"""Options of models, encoding and optimizers, which several jobs share."""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, PositiveFloat, PositiveInt, model_validator

from rlhf_critic.config.base import (
    AS_TYPED,
    Decay,
    Fraction,
    ModelPath,
    NonNegativeFloat,
    NonNegativeInt,
    Section,
    absolute_path,
)

SpecialTokensInText = Literal["text", "token"]
TemplateDate = Literal["fixed", "today"]
# Values of chat_template that are never file names, though there may be files of that name.
AUTO_TEMPLATE = "auto"
PLAIN_TEMPLATE_NAME = "plain"
ARTICLE_TEMPLATE_NAME = "article"
OPENRLHF_TEMPLATE_NAME = "openrlhf"
OPENRLHF_PLAIN_TEMPLATE_NAME = "openrlhf-plain"
SHIPPED_TEMPLATE_NAMES = (
    AUTO_TEMPLATE,
    PLAIN_TEMPLATE_NAME,
    OPENRLHF_TEMPLATE_NAME,
    OPENRLHF_PLAIN_TEMPLATE_NAME,
    ARTICLE_TEMPLATE_NAME,
)


def _absolute_template(template: str) -> str:
    return template if template in SHIPPED_TEMPLATE_NAMES else absolute_path(template)


BodyT = TypeVar("BodyT", bound="BodyConfig")
Dtype = Literal["float32", "bfloat16"]
AutoDtype = Literal["auto", "float32", "bfloat16"]


def resolve_dtype(dtype: AutoDtype, on_gpu: bool) -> Dtype:
    """Returns the dtype that auto stands for: bfloat16 on a GPU, float32 on a CPU."""
    if dtype == "auto":
        return "bfloat16" if on_gpu else "float32"
    return dtype


ChatTemplate = Annotated[str, AfterValidator(_absolute_template), AS_TYPED]


class BodyConfig(Section):
    """A base model and the part of it that is used."""

    path: ModelPath = ""
    """Base model, a Hugging Face directory or hub id (required)."""
    num_layers: PositiveInt | None = None
    """Number of first layers to keep; None keeps all."""
    freeze_layers: NonNegativeInt = 0
    """Freeze the embeddings and this many of the first layers; 0 trains everything."""
    dtype: AutoDtype = "auto"
    """Dtype of parameters and activations. auto is bfloat16 on a GPU and float32 on a CPU. float32 on a GPU multiplies
    in TF32. Values, rewards and log-probabilities are always float32."""
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Attention kernel of transformers. auto is sdpa where the model family supports it, else eager. flash_attention_2
    needs a GPU and its own package, and runs padded batches."""
    prefix_tree: bool = True
    """Compute shared prefixes once; off runs padded batches with the same results."""

    def resolved(self: BodyT, on_gpu: bool) -> BodyT:
        """Returns these options with the dtype that auto stands for on this kind of device."""
        return self.model_copy(update={"dtype": resolve_dtype(self.dtype, on_gpu)})


class ModelConfig(BodyConfig):
    """The base model and the head, dropout and adapters of the critic."""

    head_init: Literal["normal", "zero"] = "normal"
    """Initialisation of a new head: N(0, 1/sqrt(hidden + 1)) or zero."""
    disable_dropout: bool = True
    """Turn off dropout, and the noise and sampling of routers in training, so that rewards are deterministic."""
    lora_rank: NonNegativeInt = 0
    """Rank of low-rank adapters, which are trained with the head instead of all weights; 0 is off. Needs peft
    (rlhf-critic[lora]). Checkpoints hold the merged weights."""
    lora_alpha: PositiveFloat = 16.0
    """Scale of the adapters: lora_alpha / lora_rank."""
    lora_dropout: Decay = 0.0
    """Dropout probability of the adapters' input."""
    lora_target_modules: tuple[str, ...] = ()
    """Names of the modules that get adapters, such as q_proj v_proj; empty means all linear layers."""


class EncodingConfig(Section):
    """Conversion of a prompt and a response to token ids."""

    chat_template: ChatTemplate = "auto"
    """Chat template: 'auto' (the tokenizer's own, else plain), 'plain' (prompt, response, EOS), 'openrlhf' (the
    tokenizer's own, ended as OpenRLHF does), 'openrlhf-plain' (joined as OpenRLHF does), 'article' (prompt, space,
    response, <|im_end|>) or the path of a Jinja file."""
    max_length: PositiveInt = 1024
    """Maximum sequence length in tokens. Longer sequences are truncated from the left."""
    special_tokens_in_text: SpecialTokensInText = "text"
    """How to read a special token, such as <|im_end|>, that is written inside a text. text: as ordinary text, so that
    an answer cannot end its own turn. token: as the token, as plain transformers does."""
    template_date: TemplateDate = "fixed"
    """Date that a chat template gets if it asks for the current one. fixed: 01 Jan 2025, so that a text keeps its
    reward. today: the current date, as in plain transformers; rewards then change from day to day."""


class AssumedEncoding(Section):
    """The encoding that is assumed for a reward model without critic.json. None takes the model's own."""

    chat_template: ChatTemplate | None = None
    """Chat template of a reward model without critic.json: a name or path as in training. None uses its tokenizer's
    own, else plain. Every scorer must reach the file."""
    max_length: PositiveInt | None = None
    """Maximum sequence length in tokens of a reward model without critic.json. None takes the limit of its tokenizer
    and config."""
    template_date: TemplateDate | None = None
    """Date for the chat template of a reward model without critic.json, if it asks for the current one: fixed or today,
    as in training. None is fixed."""

    @property
    def encoding(self) -> AssumedEncoding:
        """These options alone."""
        return AssumedEncoding(**self.model_dump(include=set(AssumedEncoding.model_fields)))


class ShardingConfig(Section):
    """The options that decide the memory of a shard in training."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them: less memory, slower."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """ZeRO stage of DeepSpeed: 0 shards nothing, 1 optimizer state, 2 also gradients, 3 also parameters."""
    offload_optimizer: bool = False
    """Keep optimizer state in CPU memory; needs zero_stage 1 to 3."""
    offload_parameters: bool = False
    """Keep parameters in CPU memory until they are used; needs zero_stage 3."""

    @model_validator(mode="after")
    def _offload_needs_shards(self) -> ShardingConfig:
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer needs zero_stage 1, 2 or 3")
        if self.offload_parameters and self.zero_stage != 3:
            raise ValueError("offload_parameters needs zero_stage 3")
        return self


class OptimizerConfig(ShardingConfig):
    """The optimizer, its schedule and its sharding by DeepSpeed."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """Optimizer. muon is torch's Muon for the matrices between embeddings and head, and AdamW for the rest, with one
    learning rate. It needs zero_stage 0, because other stages split matrices. It is for GPUs: torch computes it in
    bf16, and a CPU without bf16 instructions takes minutes a step for 70 million parameters."""
    learning_rate: PositiveFloat = 1e-5
    """Peak learning rate of AdamW."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning-rate schedule after warm-up."""
    warmup_fraction: Fraction = 0.05
    """Fraction of all steps over which the learning rate rises from 0."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW's decoupled weight decay, applied to matrices only."""
    adam_beta1: Decay = 0.9
    """AdamW's decay rate of the first moment."""
    adam_beta2: Decay = 0.95
    """AdamW's decay rate of the second moment."""
    adam_epsilon: PositiveFloat = 1e-8
    """Offset in the denominator of AdamW."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Maximum global gradient norm; larger gradients are clipped. 0 does not clip."""
    token_budget: PositiveInt | Literal["auto"] = "auto"
    """Maximum number of tokens computed per micro-batch; auto measures a few sizes at the start. Changes speed and
    memory, and results only by rounding."""

    @model_validator(mode="after")
    def _muon_needs_whole_matrices(self) -> OptimizerConfig:
        if self.optimizer == "muon" and self.zero_stage != 0:
            raise ValueError(
                f"optimizer muon needs zero_stage 0, and zero_stage is {self.zero_stage}: other stages split matrices"
            )
        return self
