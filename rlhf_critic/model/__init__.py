"""What computes: critic, policy, attention, factories, weights. Knows no optimizer."""
