#!/usr/bin/env bash
# What to add to a verl command so that its rewards come from a running pool (not run with verl itself).
# Each row of the data needs its prompt in extra_info.prompt.
export RLHF_CRITIC_URL=http://127.0.0.1:8000
file=$(python -c 'import rlhf_critic.integrations.verl as module; print(module.__file__)')
python -m verl.trainer.main_ppo \
    reward_model.reward_manager=batch \
    custom_reward_function.path="$file" \
    custom_reward_function.name=compute_scores \
    "$@"
