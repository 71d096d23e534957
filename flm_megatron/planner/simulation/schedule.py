"""What each pipeline rank does in a step, in order: passes and transfers, as megatron-core's schedules have them.

`forward_backward_pipelining_without_interleaving` (1F1B) and `forward_backward_pipelining_with_interleaving` of
megatron-core 0.16, the latter with transfers that overlap its steady phase but not warm-up and flush, as this program
sets the engine, or with none that do, as Megatron-LM had it until 2023.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

End = Literal["send previous", "receive previous", "send next", "receive next"]
"""One side of a transfer between neighbours of the pipeline, which is a ring to interleaved chunks."""


class Pass(NamedTuple):
    """Forward or backward pass of a micro-batch through a model chunk of the rank, counted from 0."""

    backward: bool
    micro_batch: int
    chunk: int = 0


class Exchange(NamedTuple):
    """Transfers that a rank starts together; where it `waits` it goes on when all of them have ended."""

    ends: tuple[End, ...]
    waits: bool = True


class Wait(NamedTuple):
    """A rank waits for the oldest of the transfers of a kind that it has not waited for yet."""

    end: End


Item = Pass | Exchange | Wait


@dataclass(frozen=True)
class Schedule:
    """The engine's schedule of a pipeline: interleaved where ranks have several chunks, 1F1B where they have one.

    Interleaved, `micro_batches` is a multiple of `pipeline`.
    """

    pipeline: int
    micro_batches: int
    chunks: int = 1
    overlaps: bool = True
    """Whether transfers of the interleaved schedule run beside its steady passes."""

    @property
    def group(self) -> int:
        """Micro-batches by which the schedule repeats itself once the pipeline is filled."""
        return self.pipeline if self.chunks > 1 else 1

    def order(self, rank: int) -> Iterator[Item]:
        """What pipeline rank `rank` does, in order."""
        if self.chunks == 1:
            return _one_forward_one_backward(self, rank)
        return (_Interleaved if self.overlaps else _Blocking)(self, rank).order()


def _one_forward_one_backward(schedule: Schedule, rank: int) -> Iterator[Item]:
    first, last = rank == 0, rank == schedule.pipeline - 1
    warm_up = min(schedule.pipeline - rank - 1, schedule.micro_batches)
    steady = schedule.micro_batches - warm_up
    for number in range(warm_up):
        if not first:
            yield Exchange(("receive previous",))
        yield Pass(False, number)
        yield Exchange(("send next",))
    if steady and not first:
        yield Exchange(("receive previous",))
    for number in range(steady):
        yield Pass(False, warm_up + number)
        if not last:
            yield Exchange(("send next", "receive next"))
        yield Pass(True, number)
        if not first:
            yield Exchange(("send previous", "receive previous") if number < steady - 1 else ("send previous",))
    for number in range(steady, schedule.micro_batches):
        yield Exchange(("receive next",))
        yield Pass(True, number)
        if not first:
            yield Exchange(("send previous",))


class _Interleaved:
    """The interleaved schedule of one rank; passes are counted over all of its chunks.

    Unless said otherwise a transfer is waited for in the next pass that needs it.
    """

    def __init__(self, schedule: Schedule, rank: int) -> None:
        pipeline, chunks = schedule.pipeline, schedule.chunks
        self.pipeline, self.chunks = pipeline, chunks
        self.first, self.last = rank == 0, rank == pipeline - 1
        self.table = [
            (micro_batch, chunk)
            for start in range(0, schedule.micro_batches, pipeline)
            for chunk in range(chunks)
            for micro_batch in range(start, start + pipeline)
        ]
        self.warm_up = min(2 * (pipeline - rank - 1) + (chunks - 1) * pipeline, len(self.table))
        self.steady = len(self.table) - self.warm_up
        self.sent = {"send previous": False, "send next": False}
        self.awaited = {"receive previous": 0, "receive next": 0}

    def order(self) -> Iterator[Item]:
        """All that the rank does."""
        if not self.first:
            yield Exchange(("receive previous",))
        yield from self._fill()
        for number in range(self.steady):
            yield from self._forward(self.warm_up + number, number == self.steady - 1)
            yield from self._backward(number)
        yield from self._flush()

    def _fill(self) -> Iterator[Item]:
        for number in range(self.warm_up):
            yield self._pass(number, backward=False)
            receives = self._receives(number, False) and number < len(self.table) - 1
            yield from _exchange({"receive previous": receives, "send next": self._sends(number, False)}, waits=True)
        if self.steady and not self.last:
            yield Exchange(("receive next",), waits=False)
            self.awaited["receive next"] += 1

    def _forward(self, number: int, final: bool) -> Iterator[Item]:
        if not (self.first and self._chunk(number, False) == 0):
            yield from self._received("receive previous")
        yield self._pass(number, backward=False)
        receives = self._receives(number, False) and not final
        yield from self._start("receive previous", receives, "send next", self._sends(number, False))

    def _backward(self, number: int) -> Iterator[Item]:
        if not (self.last and self._chunk(number, True) == self.chunks - 1):
            yield from self._received("receive next")
        yield self._pass(number, backward=True)
        yield from self._start("receive next", self._receives(number, True), "send previous", self._sends(number, True))

    def _flush(self) -> Iterator[Item]:
        if not self.steady and not self.last:
            yield Exchange(("receive next",))
        for number in range(self.steady, len(self.table)):
            if number and not (self.last and self._chunk(number, True) == self.chunks - 1):
                yield from self._received("receive next")
            yield self._pass(number, backward=True)
            receives = self._receives(number, True) and number < len(self.table) - 1
            yield from _exchange({"send previous": self._sends(number, True), "receive next": receives}, waits=True)
        if self.sent["send previous"]:
            yield Wait("send previous")

    def _start(self, receive: End, receives: bool, send: End, sends: bool) -> Iterator[Item]:
        """Start transfers, and wait for what was sent the time before."""
        yield from _exchange({receive: receives, send: sends}, waits=False)
        if self.sent[send]:
            yield Wait(send)
        self.sent[send] = sends
        self.awaited[receive] += receives

    def _received(self, receive: End) -> Iterator[Item]:
        if self.awaited[receive]:
            self.awaited[receive] -= 1
            yield Wait(receive)

    def _pass(self, number: int, backward: bool) -> Pass:
        return Pass(backward, self.table[number][0], self._chunk(number, backward))

    def _chunk(self, number: int, backward: bool) -> int:
        chunk = self.table[number % len(self.table)][1]
        return self.chunks - 1 - chunk if backward else chunk

    def _sends(self, number: int, backward: bool) -> bool:
        """Whether somebody goes on with what a pass gives."""
        chunk = self._chunk(number, backward)
        return not (self.first and chunk == 0 if backward else self.last and chunk == self.chunks - 1)

    def _receives(self, number: int, backward: bool) -> bool:
        """Whether something comes in beside a pass, for the next one; to the rank at which passes enter the pipeline,
        what the rank at its other end has done."""
        if not (self.last if backward else self.first):
            return True
        done = number - (self.pipeline - 1)
        return done >= 0 and self._chunk(done, backward) != (0 if backward else self.chunks - 1)


class _Blocking(_Interleaved):
    """Without overlap: after each steady pair of passes both hand on what they gave, and the rank waits for all."""

    def _fill(self) -> Iterator[Item]:
        for number in range(self.warm_up):
            yield self._pass(number, backward=False)
            asked = self._both(number, False, number == len(self.table) - 1)
            if self.steady and number == self.warm_up - 1:
                asked["receive next"] = not self.last
            yield from _exchange(asked, waits=True)

    def order(self) -> Iterator[Item]:
        """All that the rank does."""
        if not self.first:
            yield Exchange(("receive previous",))
        yield from self._fill()
        for number in range(self.steady):
            yield self._pass(self.warm_up + number, backward=False)
            yield self._pass(number, backward=True)
            asked = self._both(self.warm_up + number, False, number == self.steady - 1)
            yield from _exchange(asked | self._both(number, True, number == len(self.table) - 1), waits=True)
        yield from self._flush()

    def _both(self, number: int, backward: bool, final: bool) -> dict[End, bool]:
        send: End = "send previous" if backward else "send next"
        receive: End = "receive next" if backward else "receive previous"
        return {send: self._sends(number, backward), receive: self._receives(number, backward) and not final}


def _exchange(asked: dict[End, bool], waits: bool) -> Iterator[Item]:
    ends = tuple(end for end, wanted in asked.items() if wanted)
    if ends:
        yield Exchange(ends, waits)
