"""Text from a checkpoint: `generate` takes the steps, `sampling` chooses tokens, `run` is `flm generate`."""
