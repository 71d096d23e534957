"""A checkpoint that was never read from a disk: its values lie in the memory of the ranks of the world.

What a rank wants of it depends on lazy checkpoints above it, so each load goes through its reads twice: first without
values, to note which regions they read of this checkpoint, then round by round with the values that have arrived.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from flm_megatron.checkpoint.exchange.description import Held, NamedRegion
from flm_megatron.checkpoint.exchange.plan import ROUND_BYTES, Traffic
from flm_megatron.checkpoint.exchange.transport import Moved, agreed_plan, arrivals
from flm_megatron.checkpoint.logical import LogicalCheckpoint, Region
from flm_megatron.checkpoint.without_values import without_values
from flm_megatron.errors import RequestError

MIB = 2**20


@dataclass(frozen=True)
class Crossing:
    """What it took the ranks to load from each other's memory: the traffic of all, seconds of this rank in all and for
    sending and receiving alone."""

    traffic: Traffic
    seconds: float
    exchange_s: float

    def text(self) -> str:
        """One line for the log."""
        sent, most = sum(self.traffic.sent) / MIB, max(self.traffic.sent) / MIB
        return (
            f"loaded from the memory of the ranks: {sent:,.1f} MiB sent between them, at most {most:,.1f} by one, in "
            f"{self.traffic.rounds} rounds; {self.seconds:.2f} s, {self.exchange_s:.2f} s of them on the way"
        )


class LiveCheckpoint(LogicalCheckpoint):
    """The tensors of `saved`, a checkpoint of what the ranks of the world hold; this one holds `held`.

    It is read in `rounds`, which all ranks call together, and at no other time; `release` lets its memory go.
    """

    def __init__(self, saved: LogicalCheckpoint, held: Sequence[Held], round_bytes: int = ROUND_BYTES) -> None:
        self.manifest, self.tensors = saved.manifest, saved.tensors
        self.moved = Moved()
        self.traffic = Traffic([], [], [])
        self._held, self._round_bytes = held, round_bytes
        self._noted: dict[NamedRegion, None] | None = None
        self._arrived: dict[NamedRegion, torch.Tensor] = {}

    def read(self, name: str, region: Region | None = None) -> torch.Tensor:
        """Values of `region` in memory of the host; see `LogicalCheckpoint.read`."""
        if name not in self.tensors:
            raise RequestError(f"the stage in the memory of the ranks has no tensor {name}")
        region = region or Region.whole(self.tensors[name].shape)
        if self._noted is None and region.numel:
            return self._arrived[name, region].cpu()
        if self._noted is not None and region.numel:
            self._noted[name, region] = None
        return torch.empty(region.sizes, dtype=self.tensors[name].dtype)

    def rounds(self, reads: Sequence[Callable[[], object]]) -> Iterator[list[int]]:
        """Numbers of `reads` that can be called before the next round, in which each reads what it read when noted.

        `reads` read this checkpoint, by way of others or not; each is called once without values before the first
        round. All ranks of the world must call, and go through all rounds.

        Raises:
            RequestError: (on every rank) a read wants what no rank holds.
        """
        self.moved = Moved()
        wanted = self._noted_reads(reads)
        plan = agreed_plan(self._held, wanted, self._round_bytes)
        self.traffic = plan.traffic
        for arrived in arrivals(plan, [tensor for _, _, tensor in self._held], self.moved):
            of_groups = (zip(wanted[group], values, strict=True) for group, values in arrived)
            self._arrived = {each: values for group in of_groups for each, values in group}
            yield [group for group, _ in arrived]
        self._arrived = {}

    def give(self) -> None:
        """Read nothing while other ranks go through their `rounds`."""
        for _ in self.rounds([]):
            pass

    def release(self) -> None:
        """Let this rank's memory go: nothing can be read any more."""
        self._held = ()

    def _noted_reads(self, reads: Sequence[Callable[[], object]]) -> list[list[NamedRegion]]:
        """The regions of this checkpoint that each call reads."""
        from torch._subclasses.fake_tensor import FakeTensorMode

        found = []
        with FakeTensorMode(allow_non_fake_inputs=True), without_values(lambda *_: None):
            for read in reads:
                self._noted = {}
                read()
                found.append(list(self._noted))
        self._noted = None
        return found


def live_source(checkpoint: LogicalCheckpoint) -> LiveCheckpoint | None:
    """The live checkpoint that a checkpoint reads, by way of others or not; none if it reads none."""
    found: LogicalCheckpoint | None = checkpoint
    while found is not None and not isinstance(found, LiveCheckpoint):
        found = getattr(found, "source", None)
    return found


def read_all(
    checkpoint: LogicalCheckpoint, regions: Sequence[NamedRegion], use: Callable[[int, torch.Tensor], None]
) -> None:
    """Call `use(number, values)` for each of `regions`, in order.

    If the checkpoint lies in the memory of the ranks all of them must call, each with regions of its own.
    """
    live = live_source(checkpoint)
    if live is None:
        for number, each in enumerate(regions):
            use(number, checkpoint.read(*each))
        return
    for arrived in live.rounds([partial(checkpoint.read, *each) for each in regions]):
        for number in arrived:
            use(number, checkpoint.read(*regions[number]))
