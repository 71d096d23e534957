"""Evaluating checkpoints: bits per byte (`perplexity`), tasks (`harness`), text (`generation`), and the `report`.

`evaluated` opens the checkpoint under evaluation, `model` runs it, `session` does so over any number of processes.
"""
