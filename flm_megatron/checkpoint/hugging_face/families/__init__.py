"""Families of models that `transformers` knows: one file each, with its names of modules and its `config.json`.

`family.Family` is what such a file makes, `registry` finds the one that is meant.
"""
