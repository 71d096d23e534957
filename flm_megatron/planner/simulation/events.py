"""Begin and end of everything that the pipeline ranks of a step do, and what each of them has waited for.

A transfer begins when both ranks have come to it and the one before it between the two has ended. A rank that waits
for a transfer waits for the other rank until it begins (`bubble`), and for the bytes from then on (`pipeline`).
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from flm_megatron.planner.simulation.schedule import End, Exchange, Item, Pass, Wait


class Work(NamedTuple):
    """Work of a rank that is no pass of the schedule (or a part of one), such as an optimizer step."""

    name: str
    seconds: float


class Collective(NamedTuple):
    """Communication that a rank starts on a stream of its own, beside what it computes; one after the other there."""

    name: str
    stream: str
    seconds: float


class Join(NamedTuple):
    """A rank waits for all that it has started on a stream."""

    stream: str


class Meet(NamedTuple):
    """Communication of all pipeline ranks: it begins when the last of them has come, and all wait for it. What it
    takes counts as time of `stream`."""

    name: str
    stream: str
    seconds: float


Task = Item | Work | Collective | Join | Meet


class Span(NamedTuple):
    """Something that a rank did on a stream, or waited for (`bubble`, or the stream's name), from begin to end."""

    rank: int
    stream: str
    what: Pass | str
    begin: float
    end: float


@dataclass(frozen=True)
class Simulation:
    """Seconds of a step, and of each rank by what it spent them on: `compute`, `bubble`, `pipeline` and other streams
    that it waited for; their sum is the step's. `spans` are in the order in which they were found."""

    seconds: float
    ranks: tuple[Mapping[str, float], ...]
    spans: tuple[Span, ...] = ()


def simulate(
    programs: Sequence[Iterable[Task]],
    seconds: Callable[[int, Pass], float],
    transfer_s: Callable[[int, int], float],
    record: bool = False,
) -> Simulation:
    """Run the programs of all pipeline ranks against each other.

    `seconds` is how long a pass of a rank takes, `transfer_s` a transfer from one rank to another; both are asked anew
    for each pass and transfer, so that they may vary. With `record` the spans are kept.

    Raises:
        ValueError: ranks wait for each other for ever.
    """
    return _Events(programs, seconds, transfer_s, record).run()


class _Channel:
    """Transfers of one direction of the schedule from one rank to its neighbour, in order."""

    __slots__ = ("begins", "ends", "posts", "receiver", "seconds", "sender")

    def __init__(self, sender: int, receiver: int, seconds: Callable[[int, int], float]) -> None:
        self.sender, self.receiver, self.seconds = sender, receiver, seconds
        self.posts: tuple[list[float], list[float]] = ([], [])
        self.begins: list[float] = []
        self.ends: list[float] = []

    def post(self, clock: float, receives: bool) -> int | None:
        """One side has come to its next transfer; the rank that has waited at the other side, if it may go on now."""
        posts, others = self.posts[receives], self.posts[not receives]
        number = len(posts)
        posts.append(clock)
        if len(others) <= number:
            return None
        begin = max(clock, others[number], self.ends[-1] if self.ends else 0.0)
        self.begins.append(begin)
        self.ends.append(begin + self.seconds(self.sender, self.receiver))
        return self.sender if receives else self.receiver


Ticket = tuple[_Channel, int]
"""A transfer: its channel, and its number there."""


class _Rank:
    """One rank: its clock, what is left of its program, and what it waits for."""

    def __init__(self, number: int, program: Iterable[Task], ends: Mapping[End, _Channel]) -> None:
        self.number, self.program, self.ends = number, iter(program), ends
        self.clock = 0.0
        self.spent = defaultdict(float, compute=0.0, bubble=0.0, pipeline=0.0)
        self.free: dict[str, float] = {}
        self.waits_for: list[Ticket] = []
        self.unwaited: dict[End, deque[Ticket]] = {end: deque() for end in ends}
        self.ready = True
        self.meets = False


class _Events:
    def __init__(
        self,
        programs: Sequence[Iterable[Task]],
        seconds: Callable[[int, Pass], float],
        transfer_s: Callable[[int, int], float],
        record: bool,
    ) -> None:
        size = len(programs)
        forward = [_Channel(rank, (rank + 1) % size, transfer_s) for rank in range(size)]
        backward = [_Channel(rank, (rank - 1) % size, transfer_s) for rank in range(size)]
        self.seconds, self.record = seconds, record
        self.channels = [*forward, *backward]
        self.spans: list[Span] = []
        self.meeting: list[tuple[_Rank, Meet]] = []
        self.ranks = [
            _Rank(
                rank,
                program,
                {
                    "send next": forward[rank],
                    "receive previous": forward[rank - 1],
                    "send previous": backward[rank],
                    "receive next": backward[(rank + 1) % size],
                },
            )
            for rank, program in enumerate(programs)
        ]

    def run(self) -> Simulation:
        """The programs to their ends."""
        self.ready = deque(self.ranks)
        done = 0
        while self.ready:
            done += self._advance(self.ready.popleft())
        if done < len(self.ranks):
            raise ValueError("pipeline ranks wait for each other for ever")
        seconds = max(rank.clock for rank in self.ranks)
        for rank in self.ranks:
            self._wait(rank, "bubble", seconds)
        spent = tuple(dict(rank.spent) for rank in self.ranks)
        return Simulation(seconds, spent, (*self.spans, *self._transfers()))

    def _advance(self, rank: _Rank) -> bool:
        """Go on with a rank until it has to wait for another one; true at its end."""
        rank.ready = False
        if not self._arrived(rank):
            return False
        for task in rank.program:
            if isinstance(task, Pass):
                self._work(rank, task, self.seconds(rank.number, task))
            elif isinstance(task, Exchange):
                self._start(rank, task)
            elif isinstance(task, Wait):
                rank.waits_for.append(rank.unwaited[task.end].popleft())
            else:
                self._other(rank, task)
            if rank.meets or not self._arrived(rank):
                return False
        return True

    def _arrived(self, rank: _Rank) -> bool:
        """Whether the transfers that a rank waits for have ended; it has waited for them then."""
        if not rank.waits_for:
            return True
        if any(len(channel.ends) <= number for channel, number in rank.waits_for):
            return False
        channel, number = max(rank.waits_for, key=lambda ticket: ticket[0].ends[ticket[1]])
        self._wait(rank, "bubble", channel.begins[number])
        self._wait(rank, "pipeline", channel.ends[number])
        rank.waits_for.clear()
        return True

    def _start(self, rank: _Rank, exchange: Exchange) -> None:
        for end in exchange.ends:
            channel, receives = rank.ends[end], end.startswith("receive")
            ticket = channel, len(channel.posts[receives])
            met = channel.post(rank.clock, receives)
            if met is not None and self.ranks[met].waits_for:
                self._wake(self.ranks[met])
            (rank.waits_for if exchange.waits else rank.unwaited[end]).append(ticket)

    def _other(self, rank: _Rank, task: Work | Collective | Join | Meet) -> None:
        if isinstance(task, Work):
            self._work(rank, task.name, task.seconds)
        elif isinstance(task, Collective):
            begin = max(rank.clock, rank.free.get(task.stream, 0.0))
            rank.free[task.stream] = begin + task.seconds
            self._note(rank, task.stream, task.name, begin, begin + task.seconds)
        elif isinstance(task, Join):
            self._wait(rank, task.stream, rank.free.get(task.stream, 0.0))
        else:
            self._meet(rank, task)

    def _meet(self, rank: _Rank, meet: Meet) -> None:
        rank.meets = True
        self.meeting.append((rank, meet))
        if len(self.meeting) < len(self.ranks):
            return
        begin = max(rank.clock for rank in self.ranks)
        for one, its in self.meeting:
            self._wait(one, "bubble", begin)
            self._note(one, its.stream, its.name, begin, begin + its.seconds)
            self._wait(one, its.stream, begin + its.seconds)
            one.meets = False
            if one is not rank:
                self._wake(one)
        self.meeting.clear()

    def _wake(self, rank: _Rank) -> None:
        if not rank.ready:
            rank.ready = True
            self.ready.append(rank)

    def _work(self, rank: _Rank, what: Pass | str, seconds: float) -> None:
        rank.spent["compute"] += seconds
        self._note(rank, "compute", what, rank.clock, rank.clock + seconds)
        rank.clock += seconds

    def _wait(self, rank: _Rank, reason: str, until: float) -> None:
        if until > rank.clock:
            rank.spent[reason] += until - rank.clock
            self._note(rank, "compute", reason, rank.clock, until)
            rank.clock = until

    def _note(self, rank: _Rank, stream: str, what: Pass | str, begin: float, end: float) -> None:
        if self.record:
            self.spans.append(Span(rank.number, stream, what, begin, end))

    def _transfers(self) -> Iterator[Span]:
        """Every transfer, on the rank that it comes from."""
        if self.record:
            for number, channel in enumerate(self.channels):
                name = "activations" if number < len(self.ranks) else "gradients"
                for begin, end in zip(channel.begins, channel.ends, strict=True):
                    yield Span(channel.sender, "pipeline", name, begin, end)
