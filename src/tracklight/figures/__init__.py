"""Pictures of a run.

Belongs here: drawing, and the choice of figures that suit a model.
Does not: storing them (`tracking`).
"""
