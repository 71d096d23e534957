"""Bad input by command: what is typed, the words that answer it, and the exit status."""
