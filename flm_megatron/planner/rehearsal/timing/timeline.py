"""What a rehearsed rank does in each pass, in order and in seconds: kernels, collectives beside them, and waiting."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FakeWork

from flm_megatron.planner.cost.throughput import slowest_of
from flm_megatron.planner.rehearsal.timing.operation_times import OperationTimes, WorkKind
from flm_megatron.planner.simulation.events import Collective, Join, Meet, Simulation, Span, Task, Work, simulate
from flm_megatron.planner.simulation.schedule import Pass, Schedule


@dataclass
class Segment:
    """A pass of a micro-batch through a model chunk, or (without a pass) what comes before or after all passes:
    seconds of kernels by kind, and everything in order; kernels in a row are one task."""

    backward: bool | None
    chunk: int = 0
    spent: Counter[WorkKind] = field(default_factory=Counter)
    tasks: list[Task] = field(default_factory=list)

    @cached_property
    def alone(self) -> Simulation:
        """Its tasks without other pipeline ranks, with spans."""
        return simulate([self.tasks], lambda *_: 0.0, lambda *_: 0.0, record=True)

    @cached_property
    def named_spans(self) -> list[Span]:
        """Its collectives, and waiting for them."""
        return [span for span in self.alone.spans if span.what]

    @cached_property
    def goes_on(self) -> bool:
        """Whether it starts or waits for something that other passes run beside: all but the tensor group's."""
        return any(not isinstance(task, Work) and getattr(task, "stream", "") != "tensor" for task in self.tasks)


@dataclass(frozen=True)
class RankTimeline:
    """Segments of a rank: of the passes that were run, of what comes before them, and of what comes after."""

    start: Segment
    passes: Mapping[tuple[bool, int], Sequence[Segment]]
    """By direction (whether backward) and model chunk those of all micro-batches that were run."""
    finish: Segment

    def segment(self, done: Pass, micro_batches: int) -> Segment:
        """What a pass of a step of `micro_batches` does. The first forward and the last backward passes are as they
        were in the step that was run, and those between them as the ones beside them."""
        found = self.passes[done.backward, done.chunk]
        if done.backward:
            return found[max(len(found) - (micro_batches - done.micro_batch), 0)]
        return found[min(done.micro_batch, len(found) - 1)]


class Timeline:
    """Takes note of what a rank does. Its group of `tensor` ranks lies within the `stage_ranks` of its pipeline rank,
    of which the `world` has several. Kernels take what they do on the slowest of all accelerators, as in plans."""

    def __init__(self, times: OperationTimes, tensor: int, stage_ranks: int, world: int) -> None:
        self.times = times
        self.tensor, self.stage_ranks, self.stages = tensor, stage_ranks, world // stage_ranks
        self.slower = slowest_of(times.machine, world)
        self.segments = [Segment(None)]
        self._streams: dict[int, tuple[dist.Work, str]] = {}

    def begin(self, backward: bool | None, chunk: int = 0) -> None:
        """What follows belongs to another pass."""
        self.segments.append(Segment(backward, chunk))

    def work(self, kind: WorkKind, seconds: float) -> None:
        """A kernel."""
        if not seconds:
            return
        seconds, segment = seconds * self.slower, self.segments[-1]
        segment.spent[kind] += seconds  # type: ignore[assignment]
        before = segment.tasks[-1] if segment.tasks else None
        if isinstance(before, Work):
            segment.tasks[-1] = Work("", before.seconds + seconds)
        else:
            segment.tasks.append(Work("", seconds))

    def collective(self, kind: str, nbytes: int, group: Sequence[int], handle: dist.Work) -> None:
        """A collective has been started; what waits for it has its handle."""
        if len(group) == 1:
            return
        seconds, tasks = self.times.collective(kind, nbytes, group), self.segments[-1].tasks
        if len({rank // self.stage_ranks for rank in group}) == self.stages > 1:
            tasks.append(Meet(kind, "model", seconds))
            return
        stream = "tensor" if len({rank // self.tensor for rank in group}) == 1 else "data"
        tasks.append(Collective(kind, stream, seconds))
        self._streams[id(handle)] = handle, stream

    def waited(self, handle: dist.Work) -> None:
        """A collective has been waited for."""
        _, stream = self._streams.pop(id(handle), (handle, None))
        if stream is not None:
            self.segments[-1].tasks.append(Join(stream))

    def launched(self, tensors: Sequence[torch.Tensor]) -> None:
        """A Triton kernel has been called with some tensors; one that is there twice stands in for what it lacks."""
        different = {
            (tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape): tensor for tensor in tensors
        }
        self.work("memory_bound", self.times.memory_bound(different.values()))

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While the block runs, waiting for collectives is noted. What was noted before is forgotten."""
        self.segments = [Segment(None)]
        wait = FakeWork.wait

        def waited(handle: FakeWork, *arguments: object) -> bool:
            """As torch's."""
            self.waited(handle)
            return wait(handle, *arguments)  # type: ignore[arg-type]

        FakeWork.wait = waited  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            FakeWork.wait = wait  # type: ignore[method-assign]

    def of_rank(self, schedule: Schedule, rank: int) -> RankTimeline:
        """The segments beside the passes of `schedule`, which pipeline rank `rank` has run."""
        start, *passes, finish = self.segments
        found: dict[tuple[bool, int], list[Segment]] = {}
        order = (item for item in schedule.order(rank) if isinstance(item, Pass))
        for done, segment in zip(order, passes, strict=True):
            assert (done.backward, done.chunk) == (segment.backward, segment.chunk)
            of_chunk = found.setdefault((done.backward, done.chunk), [])
            assert len(of_chunk) == done.micro_batch
            of_chunk.append(segment)
        return RankTimeline(start, found, finish)
