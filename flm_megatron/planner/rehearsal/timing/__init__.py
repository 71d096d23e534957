"""How long a rehearsed step takes on a machine.

`operation_times` are seconds of one operation by the planner's cost model, `timeline` is what one rank does in each
pass, `step` puts the timelines of all pipeline ranks together, `stage_timing` puts that beside the plan, and `trace`
and `picture` show it.
"""
