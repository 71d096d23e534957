"""Other programs that train the same model, for `flm bench --compare`: `compare` runs them beside this one."""
