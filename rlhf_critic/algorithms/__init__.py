"""Pure functions of tensors: preference losses, PPO, advantages. Knows no model, rank or file."""
