"""Starting a run and keeping it alive: on this machine (`run`), under torchrun (`elastic`), on a `cluster`.

`preflight` and `doctor` find what would stop it before it starts, `fine_tuning` derives a run from a checkpoint and
conversations, `heartbeat` and `neighbour` detect lost ranks, `run_lease` keeps a second run out, `outcome` prints where
the results are.
"""
