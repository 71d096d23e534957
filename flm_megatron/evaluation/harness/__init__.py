"""Tasks of lm-evaluation-harness on a checkpoint: `model` is what the harness sees, `run` is `flm eval harness`."""
