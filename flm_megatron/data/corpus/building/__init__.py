"""The parts of building a dataset: texts encoded in processes, ids written, and how far that is."""
