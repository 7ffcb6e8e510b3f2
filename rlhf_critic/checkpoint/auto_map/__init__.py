"""The self-contained modeling files that an export ships for ``auto_map``. They import nothing of this project.

``modeling_llama_reward.py`` is the one pattern. A family differs from Llama in a few names, and in whether its backbone
takes position ids; the file that is shipped is the pattern with these exchanged.
"""

from __future__ import annotations

from pathlib import Path

PATTERN = Path(__file__).with_name("modeling_llama_reward.py")
# For each model type the beginning of its classes' names, and the backbone's name in the model and its weights.
AUTO_MAP_FAMILIES = {
    "bloom": ("Bloom", "transformer"),
    "gemma2": ("Gemma2", "model"),
    "gpt2": ("GPT2", "transformer"),
    "gpt_neox": ("GPTNeoX", "gpt_neox"),
    "llama": ("Llama", "model"),
    "mistral": ("Mistral", "model"),
    "opt": ("OPT", "model"),
    "phi3": ("Phi3", "model"),
    "qwen2": ("Qwen2", "model"),
    "qwen3": ("Qwen3", "model"),
}
# The config's name for the width of the last state, where that need not be the hidden size.
HEAD_WIDTHS = {"opt": "word_embed_proj_dim"}
# ALiBi reads distances from the mask, so BLOOM's backbone takes no position ids.
WITHOUT_POSITION_IDS = {"bloom"}
POSITIONS = """\
        # Counted from each row's first real token.
        if kwargs.get("position_ids") is None:
            kwargs["position_ids"] = (columns - first) * real
"""


def reward_model_class(model_type: str) -> str:
    """The name of a family's class, for example ``LlamaRewardModel``."""
    return f"{AUTO_MAP_FAMILIES[model_type][0]}RewardModel"


def reward_model_source(model_type: str) -> str:
    """The modeling file of a family, as Python source."""
    name, backbone = AUTO_MAP_FAMILIES[model_type]
    exchanged = {
        "Llama": name,
        'base_model_prefix = "model"': f'base_model_prefix = "{backbone}"',
        "self.model": f"self.{backbone}",
        "config.hidden_size": f"config.{HEAD_WIDTHS.get(model_type, 'hidden_size')}",
        POSITIONS: "" if model_type in WITHOUT_POSITION_IDS else POSITIONS,
    }
    source = PATTERN.read_text(encoding="utf-8")
    for of_llama, of_family in exchanged.items():
        source = source.replace(of_llama, of_family)
    return source
