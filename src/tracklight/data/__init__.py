"""Data sets as tensors, one file and one YAML each. Not here: Hydra, MLflow, models."""
