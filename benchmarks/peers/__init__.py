"""Benchmarks against peers that need an environment of their own (tests/peers/install.py)."""
