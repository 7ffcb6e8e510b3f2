"""Scorer replicas on Ray Serve, their control and their HTTP endpoints."""
