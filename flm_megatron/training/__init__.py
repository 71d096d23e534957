"""The loop: `stage` trains one stage, `step` makes one step of it.

`resume` finds where a run goes on, `hooks` are what is done between steps, `metrics` writes what happened, `spikes`
refuses steps that went wrong, `frozen_weights` keeps half of the weights as they are. `elastic` is an earlier name of
what starts torchrun, for scripts that were written with it.
"""
