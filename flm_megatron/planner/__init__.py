"""Memory, time and cost of a staged run, from its run file alone, before any machine is asked for.

`plan` is `flm plan`; `search` looks for layouts, `cost` has the formulas, `machine` the hardware, `report` the text.
"""
