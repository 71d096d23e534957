"""How the indices along one axis of a grown tensor map to old indices."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from flm_megatron.growth.plan import GrowthPlan
from flm_megatron.model.parameters import Axis, Unit


@dataclass(frozen=True)
class Segment:
    """`size` indices of the grown axis from `start`; `source` is the old index of the first, none if they are new.

    `copy` marks a new layer: a copy of its source, or one without.
    """

    start: int
    size: int
    source: int | None
    copy: bool = False

    def clip(self, start: int, stop: int) -> Segment | None:
        """The segment's overlap with [start, stop); none if there is none."""
        first, last = max(self.start, start), min(self.start + self.size, stop)
        if first >= last:
            return None
        source = None if self.source is None else self.source + first - self.start
        return Segment(first, last - first, source, self.copy)


def axis_segments(plan: GrowthPlan, old: Axis, new: Axis) -> list[Segment]:
    """The whole grown axis as segments, in order and without gaps; `old` is the axis before the growth.

    Layers come from where the plan takes them. On every other axis new indices of a band follow its old ones, and new
    groups the old groups.
    """
    if new.unit is Unit.LAYER:
        return list(_joined(Segment(i, 1, layer.source, layer.copy) for i, layer in enumerate(plan.layer_sources)))
    return list(_joined(segment for segment in _segments(old, new) if segment.size))


def _segments(old: Axis, new: Axis) -> Iterator[Segment]:
    start, source = 0, 0
    for _ in range(old.groups):
        for before, after in zip(old.bands, new.bands, strict=True):
            yield Segment(start, before.size, source)
            yield Segment(start + before.size, after.size - before.size, None)
            start, source = start + after.size, source + before.size
    yield Segment(start, new.size - start, None)


def _joined(segments: Iterator[Segment]) -> Iterator[Segment]:
    """Merge neighbours whose sources are consecutive or that are all new."""
    held: Segment | None = None
    for segment in segments:
        follows = None if held is None or held.source is None else held.source + held.size
        if held is not None and (segment.source, segment.copy) == (follows, held.copy):
            held = Segment(held.start, held.size + segment.size, held.source, held.copy)
            continue
        if held is not None:
            yield held
        held = segment
    if held is not None:
        yield held
