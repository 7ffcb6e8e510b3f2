#!/usr/bin/env bash
# What to add to an OpenRLHF command so that its rewards come from a running pool: OpenRLHF 0.10 and later (before, the
# option is --remote_rm_url); not run with OpenRLHF itself. In a cluster that runs already, workers do not see this
# shell's variables: submit the command with ray job submit --runtime-env-json '{"env_vars": {"RLHF_CRITIC_URL": "..."}}'.
export RLHF_CRITIC_URL="${RLHF_CRITIC_URL:-http://127.0.0.1:8000}"
file=$(python -c 'import rlhf_critic.integrations.openrlhf as module; print(module.__file__)')
python -m openrlhf.cli.train_ppo_ray --reward.remote_url "$file" "$@"
