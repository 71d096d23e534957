"""A plan for people: `text` is printed by `flm plan`, `plot` is its picture."""
