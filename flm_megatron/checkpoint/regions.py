"""Cutting regions into smaller ones."""

from __future__ import annotations

import math
from collections.abc import Iterator

from flm_megatron.checkpoint.logical import Region


def split_region(region: Region, limit: int) -> Iterator[Region]:
    """Split into regions of at most `limit` values (at least one), in row-major order.

    Each is a contiguous run of the region's values.
    """
    if region.numel <= max(1, limit):
        yield region
        return
    axis = next(i for i, n in enumerate(region.sizes) if n > 1)
    step = max(1, limit // (region.numel // region.sizes[axis]))
    for start in range(0, region.sizes[axis], step):
        sub = slice_axis(region, axis, start, min(step, region.sizes[axis] - start))
        yield from split_region(sub, limit)


def slice_axis(region: Region, axis: int, start: int, size: int) -> Region:
    """`size` places from `start` on along one axis, counted from the region's corner."""
    offsets, sizes = list(region.offsets), list(region.sizes)
    offsets[axis] += start
    sizes[axis] = size
    return Region(tuple(offsets), tuple(sizes))


def subtract(region: Region, inner: Region) -> Iterator[Region]:
    """Regions that cover `region` without `inner`, which lies in it: two at most for each axis."""
    for axis, (offset, size) in enumerate(zip(region.offsets, region.sizes, strict=True)):
        before = inner.offsets[axis] - offset
        after = size - before - inner.sizes[axis]
        if before:
            yield slice_axis(region, axis, 0, before)
        if after:
            yield slice_axis(region, axis, size - after, after)
        region = slice_axis(region, axis, before, inner.sizes[axis])


def flat_regions(shape: tuple[int, ...], start: int, end: int) -> Iterator[Region]:
    """Regions that cover values `start` to `end` of a row-major array of `shape`, in order.

    At most three for two axes: the end of a row, whole rows, the start of a row.
    """
    if start >= end:
        return
    if not shape:
        yield Region((), ())
        return
    inner = math.prod(shape[1:])
    first, last = start // inner, (end - 1) // inner
    if first == last and len(shape) > 1:
        yield from _under(first, shape[1:], start - first * inner, end - first * inner)
        return
    whole_from, whole_to = -(-start // inner), end // inner
    if start < whole_from * inner:
        yield from _under(first, shape[1:], start - first * inner, inner)
    if whole_from < whole_to:
        yield Region((whole_from, *(0,) * (len(shape) - 1)), (whole_to - whole_from, *shape[1:]))
    if end > whole_to * inner:
        yield from _under(whole_to, shape[1:], 0, end - whole_to * inner)


def _under(index: int, shape: tuple[int, ...], start: int, end: int) -> Iterator[Region]:
    for sub in flat_regions(shape, start, end):
        yield Region((index, *sub.offsets), (1, *sub.sizes))
