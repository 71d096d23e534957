"""Streams of samples: which sample has an index, independent of layout and budget.

`stream` is the one stream of text, a `blend` of sources in the order of a `permutation`; `mixture` and `cuts` continue
it when a run changes its data or its sample length; `loader` reads it for each rank; `stage_streams` makes the streams
of a run's stages.
"""
