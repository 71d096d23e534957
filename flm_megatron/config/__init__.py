"""The run file: its fields (`schema`), how it is read (`loader`), and what it has to satisfy (`rules`).

`loader.load_run` gives the `RunConfig` of a file with its overrides, `rules.check` refuses what cannot be run.
`history` and `budget` track a run whose batch or data changed on the way, `same_model` says what counts as another
model.
"""
