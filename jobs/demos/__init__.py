"""Demos behind ``make ppo-demo``, ``make critic-demo`` and ``make overoptimisation-demo``."""
