"""Which source each sample of a blend comes from.

megatron-core's blending picks, one sample after another, the source that is furthest behind its share. It can only
start at sample 0, so a run that goes on at sample 400 million would first need the arrays of all samples before it.
Here source i wants its k-th sample at the time (k + 1/2) / weight_i and the samples are taken in the order of these
times (Webster's divisor method): also never further than about one sample from its share, the same for every prefix,
and any place can be found directly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy

BLOCK = 65536


class Blend:
    """An endless blend of sources in proportion to `weights`, computed in blocks when needed."""

    def __init__(self, weights: Sequence[float]) -> None:
        """Weights are above 0 and need not add up to 1."""
        assert len(weights) > 0
        assert min(weights) > 0
        total = math.fsum(weights)
        self.shares = numpy.array([weight / total for weight in weights])
        self._block = lru_cache(maxsize=2)(self._compute)

    def __getitem__(self, index: int) -> tuple[int, int]:
        """(source, how many samples of that source come before this one) of sample `index`."""
        block, place = divmod(index, BLOCK)
        sources, draws = self._block(block)
        return int(sources[place]), int(draws[place])

    def counts(self, samples: int) -> list[int]:
        """Samples of each source among the first `samples`."""
        # The divisor method's time of `samples` is within half the number of sources, so these are low enough.
        earliest = samples - len(self.shares) / 2 - 1
        counts = [max(0, math.floor(share * earliest - 0.5)) for share in self.shares]
        assert sum(counts) <= samples
        for _ in range(samples - sum(counts)):
            source = min(range(len(counts)), key=lambda i: (self._time(i, counts[i]), i))
            counts[source] += 1
        return counts

    def _time(self, source: int, draw: int) -> float:
        return (draw + 0.5) / float(self.shares[source])

    def _compute(self, block: int) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Sources and draws [BLOCK] of the samples of a block."""
        first, last = self.counts(block * BLOCK), self.counts((block + 1) * BLOCK)
        sizes = [end - start for start, end in zip(first, last, strict=True)]
        sources = numpy.repeat(numpy.arange(len(sizes)), sizes)
        draws = numpy.concatenate([numpy.arange(start, end) for start, end in zip(first, last, strict=True)])
        order = numpy.lexsort((sources, (draws + 0.5) / self.shares[sources]))
        return sources[order], draws[order]
