"""What a run is asked to do: composed, checked, made into objects. Not here: torch, MLflow."""
