"""The run file: what may stand in it (`schema`), how it is read (`loader`), and what it has to satisfy (`rules`).

`loader.load_run` gives the `RunConfig` of a file with its overrides, `rules.check` refuses what cannot be run.
`history` and `budget` say how far a run is whose batch or data changed on the way, `same_model` what counts as another
model.
"""
