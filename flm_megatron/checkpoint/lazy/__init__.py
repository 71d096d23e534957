"""Checkpoints that are stored nowhere: each region is computed when it is read.

`initial` are a model's fresh weights (made by `generator`, equal under every layout), `converted` changes the
precision, `adapters` adds or merges low-rank adapters. Grown checkpoints are in `growth.grown`.
"""
