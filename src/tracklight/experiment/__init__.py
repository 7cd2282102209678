"""One run, from its config to its score. Read `train` first.

Belongs here: building, starting, finishing, resuming and rebuilding a run.
Does not: how a step is taken (`engine`), how a point is stored (`tracking`).
"""
