"""DeepSpeed, which takes seconds to import and looks for a GPU, is imported only where ranks train or shard."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCORE_A_CRITIC = """
import sys
from actors.serving.scorer import Scorer
from rlhf_critic.checkpoint.critic_directory import load_critic
from rlhf_critic.config.serve import ScorerConfig
from rlhf_critic.scoring.local import score_sequences

loaded = load_critic(sys.argv[1])
assert score_sequences(loaded.critic, [[5, 6, 7], [5, 6, 8, 9]], token_budget=64).shape == (2,)
Scorer(ScorerConfig(checkpoint=sys.argv[1])).close()  # its warm-up scores
assert "deepspeed" not in sys.modules
"""
IMPORT_EVERY_MODULE = """
import importlib, pkgutil, sys

for package in ("rlhf_critic", "actors", "jobs"):
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
        if not module.name.startswith("rlhf_critic.integrations."):  # they import the trainers they serve
            importlib.import_module(module.name)
            assert "deepspeed" not in sys.modules, module.name
"""


def run(script: str, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_loading_and_scoring_a_critic_imports_no_deepspeed(critics):
    run(SCORE_A_CRITIC, critics["first"])


def test_no_module_imports_deepspeed_when_it_is_imported():
    run(IMPORT_EVERY_MODULE)
