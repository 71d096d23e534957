"""The smaller model: importance of units, plans, and checkpoints that keep some of a larger one."""
