"""Regions of logical tensors sent from the ranks whose memory holds them to the ranks that want them.

`plan.py` says who sends what to whom and in which round, `transport.py` carries it out, `live.py` is a checkpoint whose
values lie in the ranks' memory.
"""
