"""Token ids to micro-batches: order, plan, prefix trees, padded rows. Knows no model."""
