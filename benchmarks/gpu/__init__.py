"""Checks and measurements on a GPU machine without a package index; see run.sh."""
