#!/usr/bin/env bash
# Runs verl (0.7.1 or later) with rewards from a running pool of scorers. All arguments go to verl.
# Each row of the data needs its prompt in extra_info.prompt.

# 1. Path of the reward file in the installed package.
file=$(python -c 'import rlhf_critic.integrations.verl as module; print(module.__file__)')

# 2. Train. Workers on other machines do not see this shell's variables, so verl passes the address of the pool on.
#    For a pool with a token, pass RLHF_CRITIC_TOKEN_FILE in the same way.
python -m verl.trainer.main_ppo \
    reward.custom_reward_function.path="$file" \
    reward.custom_reward_function.name=compute_score \
    +ray_kwargs.ray_init.runtime_env.env_vars.RLHF_CRITIC_URL="${RLHF_CRITIC_URL:-http://127.0.0.1:8000}" \
    "$@"
