"""Captioning ablation: many models, each in a process of its own, on one data set.

``plan`` says what runs, ``data`` reads the CSV, ``worker`` is the process of one model, ``study``
goes through all, ``clean`` and ``metrics`` turn answers into scores, ``files`` writes them.
"""
