"""What `import flm_megatron` offers and the commands of `flm` do: one function each, options as arguments.

The package's `__init__` hands these on by name; nothing here parses a command line, and results are returned instead of
printed. A function checks all that its command checks and raises the same errors, which name options as the command
does.
"""
