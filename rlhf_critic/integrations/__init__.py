"""Rewards for other trainers: thin functions around a scorer client. Each imports its trainer only when it is used."""
