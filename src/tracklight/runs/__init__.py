"""The reading side of tracking: read, select, rank, diff. Not here: what writes (`tracking`)."""
