"""Pickles of others as plain data: a stack machine that runs nothing and reaches no class of Python's.

`reader.load_pickle` is what to call; `machine` is the stack, `opcodes` the instructions, `records` what stands for an
object.
"""
