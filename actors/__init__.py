"""What runs inside Ray actors. Imports ``rlhf_critic``; never ``jobs``."""
