"""Asks for rewards as LLaMA-Factory's PPO trainer does. Request: ``url``, ``texts``."""

import json
import os
import sys

os.environ["DISABLE_VERSION_CHECK"] = "1"

from llamafactory.train.ppo.ppo_utils import get_rewards_from_server

with open(sys.argv[1], encoding="utf-8") as file:
    request = json.load(file)
scores = get_rewards_from_server(request["url"], request["texts"])
with open(sys.argv[2], "w", encoding="utf-8") as file:
    json.dump({"scores": scores.tolist()}, file)
