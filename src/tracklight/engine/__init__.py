"""How steps are taken, stopped and saved: what Lightning calls while it trains.

Belongs here: blocks of steps, CUDA graphs, seeding, signals, checkpoints, progress.
Does not: what is trained (`models`, `data`), where it is recorded (`tracking`).
"""
