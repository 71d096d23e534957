"""How the indices along one axis of a grown tensor map to old indices."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from flm_megatron.growth.plan import GrowthPlan
from flm_megatron.model import parameters as p

Role = Literal["layer", "vocab", "write", "read", "norm", "qkv", "head", "up", "down"]
"""What an axis counts: layers; tokens; hidden channels that are written to, read from, or normed; the rows of the
query-key-value matrix; channels of heads (input of linear_proj); rows of linear_fc1; columns of linear_fc2."""

ROLES: dict[str, tuple[Role, ...]] = {
    p.EMBEDDING: ("vocab", "write"),
    p.HEAD: ("vocab", "read"),
    f"{p.FINAL_NORM}.weight": ("norm",),
    f"{p.FINAL_NORM}.bias": ("norm",),
    f"{p.ATTENTION_NORM}_weight": ("layer", "norm"),
    f"{p.ATTENTION_NORM}_bias": ("layer", "norm"),
    f"{p.MLP_NORM}_weight": ("layer", "norm"),
    f"{p.MLP_NORM}_bias": ("layer", "norm"),
    f"{p.QKV}.weight": ("layer", "qkv", "read"),
    f"{p.QKV}.bias": ("layer", "qkv"),
    f"{p.PROJECTION}.weight": ("layer", "write", "head"),
    f"{p.PROJECTION}.bias": ("layer", "write"),
    f"{p.FC1}.weight": ("layer", "up", "read"),
    f"{p.FC1}.bias": ("layer", "up"),
    f"{p.FC2}.weight": ("layer", "write", "down"),
    f"{p.FC2}.bias": ("layer", "write"),
}


@dataclass(frozen=True)
class Segment:
    """`size` indices of the grown axis from `start`; `source` is the old index of the first, none where new.

    `copy` marks a layer that is a copy of its source rather than the original.
    """

    start: int
    size: int
    source: int | None
    copy: bool = False

    def clip(self, start: int, stop: int) -> Segment | None:
        """What lies within [start, stop); none if nothing does."""
        first, last = max(self.start, start), min(self.start + self.size, stop)
        if first >= last:
            return None
        source = None if self.source is None else self.source + first - self.start
        return Segment(first, last - first, source, self.copy)


def axis_segments(plan: GrowthPlan, role: Role) -> list[Segment]:
    """The whole grown axis of a role as segments, in order and without gaps."""
    old, new = plan.old, plan.new
    if role == "layer":
        return list(_joined(Segment(i, 1, layer.source, layer.copy) for i, layer in enumerate(plan.layer_sources)))
    if role == "vocab":
        return _appended([(old.vocab_size or 0, new.vocab_size or 0)])
    if role in ("write", "read", "norm"):
        return _appended([(old.hidden_size, new.hidden_size)])
    if role in ("up", "down"):
        bands = 2 if role == "up" and new.gated else 1
        return _appended([(old.ffn_hidden_size, new.ffn_hidden_size)] * bands)
    return _head_segments(plan, with_keys=role == "qkv")


def _appended(bands: list[tuple[int, int]]) -> list[Segment]:
    """Bands of (old size, new size), each with its new indices after its old ones."""
    segments, start, source = [], 0, 0
    for before, after in bands:
        segments.append(Segment(start, before, source))
        segments.append(Segment(start + before, after - before, None))
        start, source = start + after, source + before
    return [s for s in segments if s.size]


def _head_segments(plan: GrowthPlan, with_keys: bool) -> list[Segment]:
    """Channels per query group: its queries, then (`with_keys`) its key and value; new groups after the old ones."""
    channels = plan.new.kv_channels
    before, after = (m.num_attention_heads // m.query_groups * channels for m in (plan.old, plan.new))
    keys = 2 * channels if with_keys else 0
    segments: list[Segment] = []
    for group in range(plan.old.query_groups):
        start, source = group * (after + keys), group * (before + keys)
        segments.append(Segment(start, before, source))
        segments.append(Segment(start + before, after - before, None))
        segments.append(Segment(start + after, keys, source + before))
    old_groups, new_groups = plan.old.query_groups, plan.new.query_groups
    segments.append(Segment(old_groups * (after + keys), (new_groups - old_groups) * (after + keys), None))
    return list(_joined(s for s in segments if s.size))


def _joined(segments: Iterator[Segment]) -> Iterator[Segment]:
    """Neighbours whose sources follow each other (or are all new) become one."""
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
