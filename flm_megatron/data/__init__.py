"""Text into tokens, tokens into datasets, datasets into one stream of samples."""
