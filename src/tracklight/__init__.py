"""An experiment-tracked training framework: Lightning trains, Hydra composes, MLflow remembers.

The root holds the entrance (`cli`) and what every room needs (`errors`, `paths`, `redact`).
Anything else belongs in a room.
"""
