"""The reading side of tracking: finished and running runs, read and compared.

Belongs here: reading stores, selecting runs, ranking them, telling two apart.
Does not: anything that writes to a store (`tracking`).
"""
