"""Networks with their loss and metrics: one file and one YAML each.

Belongs here: what is a function of parameters and a batch.
Does not: Hydra, MLflow, data sets.
"""
