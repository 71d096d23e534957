"""Fine-tuning: `run` prepares one from a checkpoint and conversations, `freezing` keeps half of the weights."""
