"""A critic on disk: directory, export, conversion, ``auto_map`` files."""
