"""Commands for the time before the first run."""
