#!/usr/bin/env bash
# What to add to a verl command so that its rewards come from a running pool: verl 0.7.1 and later; not run with verl
# itself. Each row of the data needs its prompt in extra_info.prompt. Workers on other machines do not see this shell's
# variables, so verl hands the address on; a pool with a token needs RLHF_CRITIC_TOKEN_FILE in the same way.
file=$(python -c 'import rlhf_critic.integrations.verl as module; print(module.__file__)')
python -m verl.trainer.main_ppo \
    reward.custom_reward_function.path="$file" \
    reward.custom_reward_function.name=compute_score \
    +ray_kwargs.ray_init.runtime_env.env_vars.RLHF_CRITIC_URL="${RLHF_CRITIC_URL:-http://127.0.0.1:8000}" \
    "$@"
