#!/usr/bin/env bash
# What to add to an OpenRLHF command so that its rewards come from a running pool (not run with OpenRLHF itself).
export RLHF_CRITIC_URL=http://127.0.0.1:8000
file=$(python -c 'import rlhf_critic.integrations.openrlhf as module; print(module.__file__)')
python -m openrlhf.cli.train_ppo_ray --remote_rm_url "$file" "$@"
