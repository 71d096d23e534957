"""The grown checkpoint: `checkpoint.GrownCheckpoint` computes any region of it when it is read.

`operators` says of which old and new values a region is made, `axes` how indices map along one axis, `step_offsets`
from which of Adam's steps each entry counts, `folding` multiplies a half-open mask into the weights.
"""
