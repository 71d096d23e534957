"""Smaller models out of larger ones: the units that matter are kept, with their weights and moments.

`importance` is how much each unit matters, read from a file or measured (`measure`, by hooks of `watch`; `table` prints
it); `choice` makes a `plan` of it (checked by `rules`), which says what is kept; `gather` finds the old values of a
region, `checkpoint.ShrunkCheckpoint` reads them; `boundary` shrinks between two stages of a run.
"""
