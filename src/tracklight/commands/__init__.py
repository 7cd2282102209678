"""The commands other than training: compare, evaluate, predict, reproduce, ui.

Belongs here: parsing a command's arguments, calling the rooms below, printing.
Does not: training, ranking, reading stores.
"""
