"""Entry points of the commands: ``rlhf-critic NAME`` or ``python -m jobs.NAME``, locally or by ``ray job submit``."""
