"""The self-contained modeling files that an export adds for ``auto_map``. They import nothing from this project.

``modeling_llama_reward.py`` is the template. Other families differ in a few names, and in whether the backbone takes
position ids; their files are the template with these replaced.
"""

from __future__ import annotations

from pathlib import Path

TEMPLATE = Path(__file__).with_name("modeling_llama_reward.py")
# Model type: prefix of its classes' names, and the backbone's name in the model and its weights.
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
# The config's name of the last hidden state's width, where it may differ from hidden_size.
HEAD_WIDTHS = {"opt": "word_embed_proj_dim"}
# BLOOM's backbone takes no position ids: ALiBi derives distances from the mask.
WITHOUT_POSITION_IDS = {"bloom"}
POSITIONS = """\
        # Counted from each row's first real token.
        if kwargs.get("position_ids") is None:
            kwargs["position_ids"] = (columns - first) * real
"""


def reward_model_class(model_type: str) -> str:
    """Returns the name of a family's class, for example ``LlamaRewardModel``."""
    return f"{AUTO_MAP_FAMILIES[model_type][0]}RewardModel"


def reward_model_source(model_type: str) -> str:
    """Returns the Python source of a family's modeling file."""
    name, backbone = AUTO_MAP_FAMILIES[model_type]
    replacements = {
        "Llama": name,
        'base_model_prefix = "model"': f'base_model_prefix = "{backbone}"',
        "self.model": f"self.{backbone}",
        "config.hidden_size": f"config.{HEAD_WIDTHS.get(model_type, 'hidden_size')}",
        POSITIONS: "" if model_type in WITHOUT_POSITION_IDS else POSITIONS,
    }
    source = TEMPLATE.read_text(encoding="utf-8")
    for of_llama, of_family in replacements.items():
        source = source.replace(of_llama, of_family)
    return source
