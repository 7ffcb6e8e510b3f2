"""Models: critic, policy, attention, factories, weights. Knows nothing about optimizers."""
