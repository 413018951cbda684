"""Profiling: latency, energy, FLOPs, memory and answers of a grid of settings.

``data`` reads and makes folders of examples, ``grid`` turns axes into cells, ``loading`` brings a
model into the precision and form a cell asks for, ``measuring`` measures one cell, ``runner`` runs
the grid and keeps its log, ``report`` writes tables, plots and pages from the log.
"""
