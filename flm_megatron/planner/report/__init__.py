"""A plan for people: `text` is what `flm plan` prints, `plot` what it draws."""
