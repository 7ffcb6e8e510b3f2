"""The DeepSpeed engines of one rank. Knows nothing about Ray."""
