"""What a run reports: `events` are the lines of its metrics, `log` writes each step, `goodput` adds up where the time
went, `plot` draws the loss."""
