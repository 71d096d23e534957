"""Learning from a teacher: a frozen model under a layout of its own in the stage's world.

`source` finds and checks its checkpoint, `teacher` runs it before every step and hands its logits to the ranks that
compute the loss.
"""
