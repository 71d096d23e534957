"""Growing a model without changing its function: what may grow into what, where new values come from, and the proof.

`boundary` is what a run does between two stages, `offline` what `flm grow` does on disk; both decide a `plan` (by
`rules` and `layers`) and read a `grown` checkpoint. `certificate` measures that the function is kept, `distance` which
layers do least, `schedule` opens masks.
"""
