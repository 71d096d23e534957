"""What a run reports: `log` writes each step, `goodput` adds up where the time went, `plot` draws the loss."""
