"""What a run reports: `events` are the lines of `metrics.jsonl`, `log` writes them, `goodput` adds up where the time
went, `plot` draws the loss."""
