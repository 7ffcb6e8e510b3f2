"""Options of models, encoding and optimizers, which several jobs share."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt, model_validator

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

# Values of chat_template that are never file names, though there may be files of that name.
AUTO_TEMPLATE = "auto"
PLAIN_TEMPLATE_NAME = "plain"


def _absolute_template(template: str) -> str:
    return template if template in {AUTO_TEMPLATE, PLAIN_TEMPLATE_NAME} else absolute_path(template)


ChatTemplate = Annotated[str, AfterValidator(_absolute_template), AS_TYPED]


class BodyConfig(Section):
    """A base model and how much of it is used."""

    path: ModelPath = Field("", description="Base model: a Hugging Face directory or hub id (required).")
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

    chat_template: ChatTemplate = Field(
        "auto",
        description="'auto' (the tokenizer's own, else plain), 'plain' (prompt, response, EOS) or the path of a Jinja "
        "file.",
    )
    max_length: PositiveInt = Field(1024, description="Most tokens of a sequence; longer ones lose their beginning.")


class ConstantSchedule(Section):
    """Defaults of an optimizer whose learning rate stays as it is, because nobody knows how long the run will be."""

    schedule: Literal["cosine", "linear", "constant"] = Field("constant", description="Learning rate after warm-up.")
    warmup_fraction: Fraction = Field(0.0, description="Fraction of all steps over which the rate rises from 0.")


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
