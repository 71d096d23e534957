"""Optimizer and learning rate: `build` makes the stage's optimizer, `adamw` is the update rule.

`learning_rate` is a pure function of run file and position, `epsilon` makes Adam's follow the gradients. `groups` says
which parameters decay and by which factor matrices learn, `by_entry` updates weights of which a growth added some: in
Adam's bias and in their learning rate they may differ from the old ones.
"""
