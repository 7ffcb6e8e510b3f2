"""The DeepSpeed engines of one rank. Knows no Ray."""
