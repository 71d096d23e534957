"""How the indices along one axis of a grown tensor map to old indices."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from flm_megatron.checkpoint.logical import Region
from flm_megatron.growth.plan import GrowthPlan
from flm_megatron.model.parameters import Axis, ParameterSpec, Unit


@dataclass(frozen=True)
class Segment:
    """`size` indices of the grown axis from `start`; `source` is the old index of the first, none if they are new.

    `copy` marks a new layer (a copy of its source, or one without) and the second and later copies of cloned units.
    Each index is one of `copies` of its source, and `noise` is where along the grown axis its noise is drawn: at its
    own index, or at another copy's whose noise it takes with the opposite sign; none for a copy without a partner.
    """

    start: int
    size: int
    source: int | None
    copy: bool = False
    copies: int = 1
    noise: int | None = None

    def clip(self, start: int, stop: int) -> Segment | None:
        """The segment's overlap with [start, stop); none if there is none."""
        first, last = max(self.start, start), min(self.start + self.size, stop)
        if first >= last:
            return None
        offset = first - self.start
        source = None if self.source is None else self.source + offset
        noise = None if self.noise is None else self.noise + offset
        return replace(self, start=first, size=last - first, source=source, noise=noise)

    def goes_on(self, segment: Segment) -> bool:
        """Whether `segment`, the next along the axis, is filled as this one is."""
        after = replace(self, start=segment.start, size=segment.size)
        moved = after if self.source is None else replace(after, source=self.source + self.size)
        return segment == (moved if self.noise is None else replace(moved, noise=self.noise + self.size))


def tensor_segments(plan: GrowthPlan, old: ParameterSpec | None, new: ParameterSpec) -> list[list[Segment]]:
    """The axes of a grown tensor as segments; `old` is none where the model before the growth has no layers."""
    if old is None:
        return [[Segment(0, axis.size, None, copy=True)] for axis in new.axes]
    return [axis_segments(plan, before, after) for before, after in zip(old.axes, new.axes, strict=True)]


def segments_within(whole: list[list[Segment]], region: Region) -> list[list[Segment]]:
    """The part of a tensor's segments that lies in a region, axis by axis."""
    return [
        [clipped for segment in segments if (clipped := segment.clip(start, start + size))]
        for segments, start, size in zip(whole, region.offsets, region.sizes, strict=True)
    ]


def axis_segments(plan: GrowthPlan, old: Axis, new: Axis) -> list[Segment]:
    """The whole grown axis as segments, in order and without gaps; `old` is the axis before the growth.

    Layers come from where the plan takes them. On every other axis new indices of a band follow its old ones, and new
    groups the old groups; of a dimension that is cloned, index i of a band is a copy of index i modulo the old size,
    and so are groups.
    """
    if new.unit is Unit.LAYER:
        return list(_joined(Segment(i, 1, layer.source, layer.copy) for i, layer in enumerate(plan.layer_sources)))
    operator = {Unit.HIDDEN: plan.hidden, Unit.FFN: plan.ffn, Unit.HEAD: plan.heads}.get(new.unit)
    segments = _cloned(old, new) if operator == "clone" else _segments(old, new)
    return list(_joined(segment for segment in segments if segment.size))


def _segments(old: Axis, new: Axis) -> Iterator[Segment]:
    start, source = 0, 0
    for _ in range(old.groups):
        for before, after in zip(old.bands, new.bands, strict=True):
            yield Segment(start, before.size, source)
            yield Segment(start + before.size, after.size - before.size, None)
            start, source = start + after.size, source + before.size
    yield Segment(start, new.size - start, None)


def _cloned(old: Axis, new: Axis) -> Iterator[Segment]:
    for group in range(new.groups):
        turn, of_group = divmod(group, old.groups)
        group_copies = _copies(old.groups, new.groups, of_group)
        band_start, source = 0, of_group * old.group_size
        for before, after in zip(old.bands, new.bands, strict=True):
            for start, size, of in _pieces(before.size, after.size):
                band_copies = _copies(before.size, after.size, of)
                copies, number = group_copies * band_copies, turn * band_copies + start // before.size
                # Copies 0 and 1 are partners, 2 and 3, and so on: the even one's index is where both draw.
                in_group, in_band = divmod(number - number % 2, band_copies)
                first = (of_group + in_group * old.groups) * new.group_size + band_start + in_band * before.size + of
                noise = first if number - number % 2 + 1 < copies else None
                at = group * new.group_size + band_start + start
                yield Segment(at, size, source + of, number > 0, copies, noise)
            band_start, source = band_start + after.size, source + before.size


def _pieces(old: int, new: int) -> Iterator[tuple[int, int, int]]:
    """(first index, size, old index of the first) of a cloned band, cut where the number of copies changes."""
    rest = new % old
    for start in range(0, new, old):
        yield start, rest, 0
        if start + old <= new:
            yield start + rest, old - rest, rest


def _copies(old: int, new: int, index: int) -> int:
    """How many of `new` indices are copies of `index` of `old` ones."""
    return (new - 1 - index) // old + 1


def _joined(segments: Iterator[Segment]) -> Iterator[Segment]:
    """Merge neighbours whose sources are consecutive or that are all new."""
    held: Segment | None = None
    for segment in segments:
        if held is not None and held.goes_on(segment):
            held = replace(held, size=held.size + segment.size)
            continue
        if held is not None:
            yield held
        held = segment
    if held is not None:
        yield held
