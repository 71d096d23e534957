"""The grown checkpoint: `checkpoint.GrownCheckpoint` computes any region of it when it is read.

`operators` says of which old and new values a region is made, `axes` how indices map along one axis, `births` when each
entry began to learn, `folding` multiplies a half-open mask into the weights.
"""
