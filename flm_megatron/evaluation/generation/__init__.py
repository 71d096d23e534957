"""Text from a checkpoint: `generate` runs the steps, `sampling` chooses tokens, `run` is `flm generate`."""
