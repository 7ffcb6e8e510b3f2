"""Entry points: ``python -m jobs.<name>``, on one machine or through ``ray job submit``."""
