"""Fuzzing of everything that reads files of others: `python -m tests.fuzzing.run --help`."""
