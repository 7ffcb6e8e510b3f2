"""Self-contained modeling files that an export ships for ``auto_map``. They import nothing of this project."""
