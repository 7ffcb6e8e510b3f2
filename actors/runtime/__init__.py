"""Ray session, groups of ranks, storage: what training, serving and PPO share."""
