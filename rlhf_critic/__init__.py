"""rlhf-critic: the reward model and critic of RLHF, the same from training to serving.

The library knows torch, transformers, deepspeed and datasets. It never imports Ray, ``actors`` or ``jobs``.
"""

__version__ = "0.1.0"
