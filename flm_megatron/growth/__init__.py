"""Growing a model without changing its function.

`boundary` grows between two stages of a run, `offline` is `flm grow`; both make a `plan` (checked by `rules`, with
copied layers from `layers`) and read a `grown` checkpoint. `certificate` measures that the function is preserved,
`distance` which layers change their input least, `opening` is how masks open, `schedule` which ones a stage has.
"""
