#!/usr/bin/env bash
# Runs OpenRLHF (0.10 or later) with rewards from a running pool of scorers. All arguments go to OpenRLHF.
# Before 0.10, the option is --remote_rm_url.

# 1. Address of the pool. In a Ray cluster that already runs, workers do not see this variable. Submit the command with
#    ray job submit --runtime-env-json '{"env_vars": {"RLHF_CRITIC_URL": "..."}}' instead.
export RLHF_CRITIC_URL="${RLHF_CRITIC_URL:-http://127.0.0.1:8000}"

# 2. Path of the reward file in the installed package.
file=$(python -c 'import rlhf_critic.integrations.openrlhf as module; print(module.__file__)')

# 3. Train.
python -m openrlhf.cli.train_ppo_ray --reward.remote_url "$file" "$@"
