"""Measured throughput: of a stage, of its layouts, beside other programs, and of this machine's own products.

`run` is `flm bench`; `calibrate` measures what the planner takes for granted; `peers` runs other programs on the same
shapes.
"""
