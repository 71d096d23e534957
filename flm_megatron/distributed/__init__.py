"""The processes of a world: starting them on this machine, joining, agreeing, and laying out groups.

`world` joins the world and makes tensor, pipeline and data parallel groups, `processes.Processes` lets several
processes work together and fail together, `channels` carries small messages over a group or the store.
`local_processes` starts a world on this machine, `under_layout` runs a function in whatever world there is; `signals`
turns signals into stop requests, `error_file` tells torchrun how a rank ended.
"""
