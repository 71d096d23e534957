"""Starting a run and keeping it alive: on this machine (`run`), under torchrun (`elastic`), on a `cluster`.

`preflight` and `doctor` find what would stop it before it starts, `fine_tuning` makes one of a checkpoint and
conversations, `heartbeat` and `neighbour` notice who is gone, `run_lease` keeps a second run out, `outcome` says at the
end where everything lies.
"""
