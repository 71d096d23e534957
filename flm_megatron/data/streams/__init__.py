"""Streams of samples: what stands at an index, for every layout and budget alike.

`stream` is the one stream of text, a `blend` of sources in the order of a `permutation`; `mixture` and `cuts` carry it
on where a run changes its data or its sample length; `loader` hands it to the ranks; `stage_streams` makes those of a
run's stages.
"""
