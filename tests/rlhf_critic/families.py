"""Small random models of every family that is tested with prefix trees, and of one without them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BloomConfig,
    DeepseekV3Config,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    Glm4Config,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    MptConfig,
    NemotronConfig,
    Olmo2Config,
    Olmo3Config,
    OPTConfig,
    PersimmonConfig,
    Phi3Config,
    PhiConfig,
    PhimoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
    StableLmConfig,
    Starcoder2Config,
)

from rlhf_critic.data.encoding import load_tokenizer
from rlhf_critic.model.backbone import PADDED_FAMILIES
from rlhf_critic.model.hf_config import silence_dropout
from rlhf_critic.model.prefix_attention import PREFIX_TREE_FAMILIES
from tests.helpers import save_tiny_tokenizer

VOCABULARY = 64
WINDOW = 6  # short enough for the tests' sequences to exceed
_TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "num_labels": 1}
_SHAPE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 256}
_GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4}
_MLP = {"intermediate_size": 48}
_GROUPED = {**_SHAPE, **_MLP, "num_key_value_heads": 2}
_WINDOWS = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_FIRST_DENSE = {"first_k_dense_replace": 1, "n_routed_experts": 4}
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}


def family_configs() -> dict[str, PreTrainedConfig]:
    """Returns a new config of every family; some families have two variants."""
    made: dict[str, tuple[Any, dict[str, Any]]] = {
        "llama": (LlamaConfig, _GROUPED),
        "mistral": (MistralConfig, {**_GROUPED, "sliding_window": None}),
        "mistral-window": (MistralConfig, {**_GROUPED, "sliding_window": WINDOW}),
        "qwen2": (Qwen2Config, _GROUPED),
        "qwen2-window": (
            Qwen2Config,
            {**_GROUPED, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
        ),
        "qwen3": (Qwen3Config, {**_GROUPED, "head_dim": 8}),
        "gemma2": (Gemma2Config, {**_GROUPED, "head_dim": 8, "sliding_window": WINDOW}),
        "gemma3_text": (Gemma3TextConfig, {**_GROUPED, **_WINDOWS, "head_dim": 8}),
        "glm4": (Glm4Config, {**_GROUPED, "head_dim": 8}),
        "olmo2": (Olmo2Config, _GROUPED),
        "olmo3": (Olmo3Config, {**_GROUPED, **_WINDOWS}),
        "smollm3": (SmolLM3Config, {**_GROUPED, "no_rope_layers": [1, 0, 1]}),
        "starcoder2": (Starcoder2Config, {**_GROUPED, "sliding_window": WINDOW}),
        "phi": (PhiConfig, _GROUPED),
        "phi3": (Phi3Config, _GROUPED),
        "phi3-window": (Phi3Config, {**_GROUPED, "sliding_window": WINDOW}),
        "gpt2": (GPT2Config, {**_GPT2, "n_positions": 256}),
        "gptj": (GPTJConfig, {**_GPT2, "n_positions": 256, "rotary_dim": 4}),
        "gpt_neox": (GPTNeoXConfig, {**_SHAPE, **_MLP}),
        "gpt_neox-sequential": (GPTNeoXConfig, {**_SHAPE, **_MLP, "use_parallel_residual": False}),
        "opt": (OPTConfig, {**_SHAPE, "ffn_dim": 48, "word_embed_proj_dim": 16}),
        "opt-post-norm": (OPTConfig, {**_SHAPE, "ffn_dim": 48, "do_layer_norm_before": False}),
        "mixtral": (MixtralConfig, {**_GROUPED, **_LOCAL_EXPERTS, "router_jitter_noise": 0.1}),
        "phimoe": (PhimoeConfig, {**_GROUPED, **_LOCAL_EXPERTS, "input_jitter_noise": 0.1, "router_jitter_noise": 2.0}),
        "qwen2_moe": (Qwen2MoeConfig, {**_GROUPED, **_EXPERTS, "shared_expert_intermediate_size": 24}),
        "qwen3_moe": (Qwen3MoeConfig, {**_GROUPED, **_EXPERTS, "head_dim": 8, "mlp_only_layers": [1]}),
        "deepseek_v3": (
            DeepseekV3Config,
            {
                **{**_SHAPE, **_MLP, **_LATENT, **_EXPERTS, **_FIRST_DENSE},
                **{"num_key_value_heads": _SHAPE["num_attention_heads"], "n_group": 2, "topk_group": 1},
            },
        ),
        "gpt_oss": (GptOssConfig, {**_GROUPED, **_WINDOWS, **_LOCAL_EXPERTS, "head_dim": 8}),
        "bloom": (BloomConfig, {"hidden_size": 32, "n_layer": 3, "n_head": 4}),
    }
    return {name: config_class(**_TOKENS, **options) for name, (config_class, options) in made.items()}


def random_model(config: PreTrainedConfig, attn_implementation: str) -> PreTrainedModel:
    """Builds a model with larger weights than usual, so that values differ enough to compare."""
    silence_dropout(config)
    torch.manual_seed(0)  # of the sinks of gpt-oss
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation=attn_implementation)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def kernels_of(config: PreTrainedConfig) -> list[str]:
    """Returns the attention kernels that transformers has for a family."""
    return ["eager"] if config.model_type in {"gemma2", "bloom", "gpt_oss"} else ["sdpa", "eager"]


BOS = 0  # of the small tokenizer
EOS = 1
NAMES = sorted({*PREFIX_TREE_FAMILIES, *PADDED_FAMILIES})
UNTESTED_NAMES = ["nemotron", "persimmon"]


def config_of(name: str) -> PreTrainedConfig:
    """Returns a new config of a family, also of one that is not tested with prefix trees."""
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    others: dict[str, tuple[Any, dict[str, Any]]] = {
        "falcon": (FalconConfig, shape),  # fused projections, one key head, tied output layer
        "mpt": (MptConfig, {"d_model": 32, "n_layers": 2, "n_heads": 4, "expansion_ratio": 2, "max_seq_len": 256}),
        "stablelm": (StableLmConfig, {**shape, **_MLP, "num_key_value_heads": 2}),  # rotates a part of each head
        "nemotron": (NemotronConfig, {**shape, **_MLP, "num_key_value_heads": 2}),
        "persimmon": (PersimmonConfig, {**shape, **_MLP}),
    }
    if name in others:
        config_class, options = others[name]
        return config_class(**options)
    return family_configs()[name]


def save_base_model(name: str, directory: Path) -> str:
    """Saves a causal language model with dropout and its tokenizer; OPT's tokenizer adds a leading BOS."""
    save_tiny_tokenizer(directory, adds_bos=name == "opt", chat_template=None)
    tokenizer = load_tokenizer(str(directory))
    config = config_of(name)
    config.vocab_size = len(tokenizer) - 1  # without the pad token that loading added
    config.bos_token_id, config.eos_token_id, config.pad_token_id = BOS, EOS, None
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # Matrices are large enough for rewards to differ; norms and biases all differ from each other.
            parameter.add_(torch.randn_like(parameter) * (0.15 if parameter.dim() > 1 else 0.05))
    model.save_pretrained(directory)
    return str(directory)
