"""Checkpoints that lie nowhere: each region is computed when it is read.

`initial` are the weights that a model starts from (`generator` makes them, equal under every layout), `converted` has
other precisions, `adapters` adds or merges low-rank adapters. Grown checkpoints are in `growth.grown`.
"""
