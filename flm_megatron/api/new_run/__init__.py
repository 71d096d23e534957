"""A first run file out of a few answers: `request` is what is asked, `shapes` makes a model of a size, `parts` chooses
the parts of the file, `write` puts them together and checks the file as `flm config` does."""
