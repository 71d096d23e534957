"""One writer for a folder: `lease.lease` holds it, `fence` is checked before anything is renamed or removed.

`holder` identifies the process, `file` are the steps on disk, each safe among any number of processes.
"""
