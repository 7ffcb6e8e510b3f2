"""Contracts with other projects: each test runs the other project's own code, in an environment of its own."""
