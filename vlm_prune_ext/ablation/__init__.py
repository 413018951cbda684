"""Captioning ablation: many models, each in a process of its own, on one data set.

``plan`` says what runs, ``data`` reads the CSV and cleans captions, ``worker`` is the process of a
model, ``study`` goes through all, ``console`` says how far it is, ``files`` writes the results.
"""
