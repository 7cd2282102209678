"""An experiment-tracked training framework. Here: the entrance and what all rooms share."""
