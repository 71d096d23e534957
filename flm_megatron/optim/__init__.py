"""Optimizer and learning rate: `build` makes the stage's optimizer, `adamw` is the update rule.

`learning_rate` is a pure function of run file and position, `epsilon` makes Adam's follow the gradients. `groups` says
which parameters decay and by which factor matrices learn, `step_offset` corrects Adam's bias for weights that a growth
added.
"""
