"""What a run is asked to do, as a checked, resolved config.

Belongs here: composing, overrides, value rules, the gate from config to objects, digests.
Does not: anything that imports torch or MLflow.
"""
