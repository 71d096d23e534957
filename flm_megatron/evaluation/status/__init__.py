"""A run as it stands, read from its output folder alone, on whatever machine sees it.

`follow` reads what its files have gained, `liveness` judges its lease, `state` is what is known of the run, `view`
shows that on a terminal and `live` keeps it up to date. Nothing here imports torch.
"""
