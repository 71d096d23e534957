"""Copies of the training state in the memory of hosts: each rank's own, and one at a neighbour's.

`agent` is the process on each host that holds them and outlives the ranks, `refresh` makes them, `checkpoint` reads
them as a checkpoint. docs/recovery.md says what is kept where.
"""
