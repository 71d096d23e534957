"""The training loop: `stage` trains one stage, `step` makes one step of it.

`resume` finds where a run continues, `hooks` are called between steps, `metrics` writes logs and metrics, `spikes`
refuses steps that went wrong, `frozen_weights` freezes half of the weights. `elastic` is the earlier name of the module
that starts torchrun, kept for scripts that call it.
"""
