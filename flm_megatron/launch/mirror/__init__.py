"""A run's output folder kept at a URL: written on this machine, sent in the background, brought back elsewhere."""
