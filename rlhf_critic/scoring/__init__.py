"""Requests for rewards: items, client, HTTP schema, request batching, components."""
