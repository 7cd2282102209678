"""The commands other than train: parse, call, print. Not here: ranking and training themselves."""
