"""The grown checkpoint: `checkpoint.GrownCheckpoint` computes each region when it is read.

`operators` says which old and new values fill a region, `axes` maps indices along one axis, `step_offsets` says at
which of Adam's steps each entry was added, `added` which entries the growth added, `entries` tells both to AdamW,
`folding` multiplies a half-open mask into the weights.
"""
