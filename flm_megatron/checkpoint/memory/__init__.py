"""Copies of the training state in the hosts' memory: each rank's own, and one at a neighbour's.

`agent` is the process on each host that holds them and outlives the ranks, `refresh` makes them, `reader` reads them as
a checkpoint. docs/recovery.md describes what is kept where.
"""
