"""A run's config: composed, checked, made into objects. Not here: torch, MLflow."""
