"""The pipeline ranks of one training step, put together: who works, who waits for whom, and for how long.

`schedule` is the order in which the engine has each rank compute, send and receive; `events` gives every task of it a
begin and an end; `extrapolate` does so for few micro-batches and adds the others. Nothing here knows what a pass
computes: how long it takes is told from outside.
"""
