"""Networks with loss and metrics, one file and one YAML each. Not here: Hydra, MLflow, data."""
