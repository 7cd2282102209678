"""What Lightning calls as it trains: steps, seeds, stops, checkpoints. Not here: the models."""
