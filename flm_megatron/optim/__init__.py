"""Optimizer and learning rate: `build` makes the stage's optimizer, `adamw` updates, `learning_rate` is a function.

The rate is a pure function of run file and position. `groups` says what decays and by which factor each matrix learns,
`step_offset` how weights that growth made take their first steps.
"""
