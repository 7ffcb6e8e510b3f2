"""Options of every job: typed, validated, documented. Knows no torch."""
