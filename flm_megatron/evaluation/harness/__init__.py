"""Tasks of lm-evaluation-harness on a checkpoint: `model` is the harness's model, `run` is `flm eval harness`."""
