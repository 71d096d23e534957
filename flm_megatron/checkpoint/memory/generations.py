"""Which generations are complete, given what the agents of all hosts hold."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from flm_megatron.checkpoint.memory.blobs import Generation
from flm_megatron.json_text import JsonObject


@dataclass
class Found:
    """A generation that is held at least in part: for each rank the numbers of the hosts that hold its blob."""

    generation: Generation
    stage: str
    step: int
    world: int
    holders: dict[int, list[int]] = field(default_factory=dict)

    @property
    def missing(self) -> list[int]:
        """Ranks whose blob no host holds."""
        return [rank for rank in range(self.world) if rank not in self.holders]


def found(inventories: Iterable[Iterable[JsonObject]]) -> list[Found]:
    """Generations in what each host lists (`do_list`'s blobs, in the order of the hosts), newest first."""
    known: dict[Generation, Found] = {}
    for host, blobs in enumerate(inventories):
        for blob in blobs:
            generation = Generation(*blob["generation"])
            entry = known.setdefault(generation, Found(generation, blob["stage"], blob["step"], blob["world"]))
            entry.holders.setdefault(blob["rank"], []).append(host)
    return [known[generation] for generation in sorted(known, reverse=True)]


def required(nbytes: list[int], hosts: list[int]) -> list[list[int]]:
    """For each host the sizes of its blobs: two for each of its own ranks and of those of the previous host.

    `nbytes` and `hosts` are those of each rank. A single host holds no copies for others.
    """
    count = max(hosts) + 1
    kept: list[list[int]] = [[] for _ in range(count)]
    for size, host in zip(nbytes, hosts, strict=True):
        for holder in {host, neighbour(host, count)}:
            kept[holder] += [size, size]
    return kept


def neighbour(host: int, count: int) -> int:
    """The number of the host that holds the copies of a host."""
    return (host + 1) % count
