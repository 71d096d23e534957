"""Who sends which region to whom, and in which round: worked out alike on every rank, from what all hold and want."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count

import torch

from flm_megatron.checkpoint.exchange.description import Description
from flm_megatron.checkpoint.logical import Region
from flm_megatron.checkpoint.regions import subtract
from flm_megatron.checkpoint.torch_dist.chunk_index import ChunkIndex
from flm_megatron.errors import RequestError

ROUND_BYTES = 64 * 2**20
"""Bytes that a rank sends, and memory for what it receives, in a round at most, unless a single group is larger."""


@dataclass(frozen=True, slots=True)
class Part:
    """A part of region number `index` of a rank: of what it holds where it sends, of what it wants where it
    receives."""

    index: int
    region: Region


@dataclass
class Round:
    """What one rank does in a round: messages by peer, each a list of parts in order, and groups that are whole then.
    Parts that it holds itself are in `local`: where it holds them, and where it wants them."""

    sends: dict[int, list[Part]] = field(default_factory=dict)
    receives: dict[int, list[Part]] = field(default_factory=dict)
    local: list[tuple[Part, Part]] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)


@dataclass
class Traffic:
    """Bytes and messages of each rank, and the number of rounds."""

    sent: list[int]
    received: list[int]
    messages: list[int]
    rounds: int = 0


@dataclass(frozen=True)
class Plan:
    """The part of `rank` in an exchange: its rounds, its description, and the traffic of all ranks.

    `dtypes` are those of all tensors that are sent.
    """

    rank: int
    own: Description
    dtypes: Mapping[str, torch.dtype]
    rounds: list[Round]
    traffic: Traffic


@dataclass(frozen=True, eq=False)
class _Source:
    """A region that is held, and by whom: rank to number of its region."""

    region: Region
    holders: dict[int, int]


@dataclass(frozen=True)
class _Group:
    """What a group of `rank` needs: parts by the rank that holds them, itself too, and bytes by sender.

    Parts are pairs: of the holder's region, of the wanted region. `buffered` is the memory that its values take.
    """

    rank: int
    number: int
    parts: dict[int, list[tuple[Part, Part]]]
    nbytes: dict[int, int]
    buffered: int

    def fits(self, sent: Sequence[int], buffered: Sequence[int], limit: int) -> bool:
        """Whether a round with this traffic has room for it; a rank without any has room for everything."""
        own = not buffered[self.rank] or buffered[self.rank] + self.buffered <= limit
        return own and all(not sent[rank] or sent[rank] + nbytes <= limit for rank, nbytes in self.nbytes.items())


def make_plan(descriptions: Sequence[Description], rank: int, round_bytes: int = ROUND_BYTES) -> Plan:
    """The part of `rank` in the exchange that serves what all ranks want, given everyone's description.

    Of several holders of a region a rank takes itself, else the one that has the least to send so far. The groups of a
    rank come in their order.

    Raises:
        RequestError: a region that nobody holds, or a tensor that ranks hold in two dtypes.
    """
    dtypes = _dtypes(descriptions)
    sources = _sources(descriptions)
    groups = _needs(descriptions, sources, dtypes)
    size = len(descriptions)
    plan = Plan(rank, descriptions[rank], dtypes, [], Traffic([0] * size, [0] * size, [0] * size))
    for several in _rounds(groups, size, round_bytes):
        plan.rounds.append(_round(several, rank, plan.traffic))
    plan.traffic.rounds = len(plan.rounds)
    return plan


def _dtypes(descriptions: Sequence[Description]) -> dict[str, torch.dtype]:
    found: dict[str, torch.dtype] = {}
    for description in descriptions:
        for name, dtype in description.dtypes.items():
            if found.setdefault(name, dtype) != dtype:
                raise RequestError(f"{name} is held in {found[name]} by one rank and in {dtype} by another")
    return found


def _sources(descriptions: Sequence[Description]) -> dict[str, ChunkIndex[_Source]]:
    """What is held, by name, with everyone who holds it."""
    found: dict[str, dict[Region, _Source]] = defaultdict(dict)
    for rank, description in enumerate(descriptions):
        for number, (name, region) in enumerate(description.held):
            found[name].setdefault(region, _Source(region, {})).holders.setdefault(rank, number)
    shapes = {name: tuple(map(max, zip(*(_end(region) for region in of), strict=True))) for name, of in found.items()}
    return {name: ChunkIndex(shapes[name], list(of.values())) for name, of in found.items()}


def _end(region: Region) -> tuple[int, ...]:
    return tuple(o + n for o, n in zip(region.offsets, region.sizes, strict=True))


def _needs(
    descriptions: Sequence[Description], sources: Mapping[str, ChunkIndex[_Source]], dtypes: Mapping[str, torch.dtype]
) -> list[list[_Group]]:
    """The groups of every rank, with who sends them what."""
    load = [0] * len(descriptions)
    found: list[list[_Group]] = []
    for rank, description in enumerate(descriptions):
        found.append([])
        indices = count()
        for number, wanted in enumerate(description.wanted):
            parts: dict[int, list[tuple[Part, Part]]] = {}
            nbytes: dict[int, int] = {}
            buffered = 0
            for (name, region), index in zip(wanted, indices, strict=False):
                itemsize = dtypes[name].itemsize if name in dtypes else 0
                covered = list(_cover(name, region, sources, rank))
                if [part for _, part in covered] != [region] or rank not in covered[0][0].holders:
                    buffered += region.numel * itemsize
                for source, part in covered:
                    holder = _holder(source, rank, load)
                    parts.setdefault(holder, []).append((Part(source.holders[holder], part), Part(index, part)))
                    if holder != rank:
                        load[holder] += part.numel * itemsize
                        nbytes[holder] = nbytes.get(holder, 0) + part.numel * itemsize
            found[-1].append(_Group(rank, number, parts, nbytes, buffered))
    return found


def _holder(source: _Source, rank: int, load: Sequence[int]) -> int:
    """The rank that gives what `source` holds."""
    return rank if rank in source.holders else min(source.holders, key=lambda holder: (load[holder], holder))


def _cover(
    name: str, region: Region, sources: Mapping[str, ChunkIndex[_Source]], rank: int
) -> Iterator[tuple[_Source, Region]]:
    """Sources and their parts that cover a region once, those that `rank` holds first.

    Raises:
        RequestError: they leave some of it out.
    """
    left = [region] if region.numel else []
    near = sources[name].meeting(region) if name in sources else []
    for source, overlap in sorted(near, key=lambda found: rank not in found[0].holders):
        rest = []
        for missing in left:
            part = missing.intersect(overlap)
            if part is None:
                rest.append(missing)
                continue
            yield source, part
            rest += subtract(missing, part)
        left = rest
    if left:
        raise RequestError(f"{name}: rank {rank} wants {left[0]}, which no rank holds")


def _rounds(groups: Sequence[Sequence[_Group]], size: int, limit: int) -> Iterator[list[_Group]]:
    """All groups cut into rounds, those of each rank in their order; another rank is served first each time."""
    at = [0] * size
    first = 0
    while any(at[rank] < len(groups[rank]) for rank in range(size)):
        sent, buffered, taken = [0] * size, [0] * size, []
        for rank in (*range(first, size), *range(first)):
            while at[rank] < len(groups[rank]) and (group := groups[rank][at[rank]]).fits(sent, buffered, limit):
                for source, nbytes in group.nbytes.items():
                    sent[source] += nbytes
                buffered[rank] += group.buffered
                taken.append(group)
                at[rank] += 1
        yield taken
        first = (first + 1) % size


def _round(groups: Sequence[_Group], rank: int, traffic: Traffic) -> Round:
    """What `rank` does in the round of `groups`; adds what all do to `traffic`."""
    mine, pairs = Round(), set()
    for group in groups:
        if group.rank == rank:
            mine.groups.append(group.number)
            mine.local += group.parts.get(rank, [])
            for source in group.nbytes:
                mine.receives.setdefault(source, []).extend(there for _, there in group.parts[source])
        elif rank in group.nbytes:
            mine.sends.setdefault(group.rank, []).extend(here for here, _ in group.parts[rank])
        for source, nbytes in group.nbytes.items():
            traffic.sent[source] += nbytes
            traffic.received[group.rank] += nbytes
            pairs.add((source, group.rank))
    for source, _ in pairs:
        traffic.messages[source] += 1
    return mine
