"""Files to token ids: sources, schemas, encoding, data sets. Knows no model."""
