"""One writer for a folder: `lease.lease` holds it, `fence` is looked at before anything is renamed or removed.

`holder` says which process it is, `file` are the steps on disk, each safe among any number of processes.
"""
