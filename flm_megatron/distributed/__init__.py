"""Processes of one world: how they start here, find each other, agree, and are laid out.

`world` joins it and lays out tensor, pipeline and data parallel groups, `processes.Processes` lets several do one piece
of work and fail together, `channels` carries small messages over groups or over the store. `local_processes` starts a
world on this machine, `under_layout` runs a function in whatever world there is; `signals` ask for a stop, and
`error_file` tells torchrun how a rank ended.
"""
