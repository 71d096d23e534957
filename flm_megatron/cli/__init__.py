"""The `flm` command: a file for each subcommand, a folder where one has actions. What they do is in the rooms."""
