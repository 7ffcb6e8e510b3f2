"""Training of a critic on preferences under Ray Train."""
