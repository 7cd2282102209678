"""Pictures of a run: which ones suit it, and drawing them. Not here: storing them (`tracking`)."""
