"""The config of a run, composed, checked and resolved.

Belongs here: composing, overrides, value rules, the gate from config to objects, digests.
Does not: anything that imports torch or MLflow.
"""
