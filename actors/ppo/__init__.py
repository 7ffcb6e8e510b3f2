"""PPO: rollout workers, the critic and policy groups, the trainer."""
