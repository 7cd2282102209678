"""Sweeps: many runs from one command.

Belongs here: the plan, Optuna's study, the loop, the executors, the parent run.
Does not: how one run is trained (`experiment`), how runs are ranked (`runs`).
"""
