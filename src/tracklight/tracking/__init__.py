"""The writing side of tracking: how a run gets into MLflow and survives a crash.

Belongs here: the store, the run as Lightning's logger, its write-ahead file, sending, recovery.
Does not: Hydra and configs (`config`), reading many runs (`runs`).
"""
