"""Measured throughput: of a stage, of its layouts, beside other programs, and of this machine's matrix products.

`run` is `flm bench`; `calibrate` measures what the planner assumes; `peers` runs other programs on the same shapes.
"""
