"""What a rank does beside its steps: how its stage begins, growth masks, validation, saving.

`beginning` finds what a stage resumes and starts from (checkpoints of the run, or `stage_checkpoint` in their place),
`loading` counts what a rank reads of it, `masks`, `validation` and `saving` are run and counted on their own.
"""
