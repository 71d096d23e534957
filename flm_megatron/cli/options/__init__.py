"""Options that several commands share, and how arguments are read."""
