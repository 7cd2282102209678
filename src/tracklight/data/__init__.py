"""Data sets as tensors on the training device: one file and one YAML each.

Belongs here: reading, splitting and encoding examples.
Does not: Hydra, MLflow, models.
"""
