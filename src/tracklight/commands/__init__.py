"""What is typed beside training: parse, call, print. Not here: ranking and training themselves."""
