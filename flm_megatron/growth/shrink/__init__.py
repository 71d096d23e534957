"""Smaller models out of larger ones: the units that matter are kept, with their weights and moments.

`importance` is how much each unit matters, measured or read from a file.
"""
