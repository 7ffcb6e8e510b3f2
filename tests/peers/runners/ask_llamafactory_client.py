"""Asks for rewards as LLaMA-Factory's PPO trainer does. Request: ``url``, ``texts``."""

import json
import os
import sys
import types
from importlib.machinery import ModuleSpec

os.environ["DISABLE_VERSION_CHECK"] = "1"
# It loads audio with this package, whose builds are for GPUs.
sys.modules["torchaudio"] = types.ModuleType("torchaudio")
sys.modules["torchaudio"].__spec__ = ModuleSpec("torchaudio", None)

from llamafactory.train.ppo.ppo_utils import get_rewards_from_server  # noqa: E402

with open(sys.argv[1], encoding="utf-8") as file:
    request = json.load(file)
scores = get_rewards_from_server(request["url"], request["texts"])
with open(sys.argv[2], "w", encoding="utf-8") as file:
    json.dump({"scores": scores.tolist()}, file)
