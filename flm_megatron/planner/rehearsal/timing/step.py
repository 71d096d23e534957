"""A whole step in seconds: what was rehearsed of every role, put together for all pipeline ranks and micro-batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

from flm_megatron.config.schema import ParallelConfig
from flm_megatron.planner.machine import Machine
from flm_megatron.planner.rehearsal.rank import RankReport
from flm_megatron.planner.rehearsal.roles import Role, global_rank
from flm_megatron.planner.rehearsal.timing.operation_times import OperationTimes
from flm_megatron.planner.rehearsal.timing.timeline import RankTimeline, Segment
from flm_megatron.planner.simulation.events import Simulation, Task, Work, simulate
from flm_megatron.planner.simulation.schedule import Pass, Schedule


@dataclass(frozen=True)
class RankSeconds:
    """What a pipeline rank spends a step on: kernels of its passes, waiting for communication of the tensor group, of
    the pipeline and of the data group, waiting for other pipeline ranks, and what is done once a step besides:
    clearing, scaling and norm of the gradients, the update, and what all pipeline ranks say to each other there."""

    matmul: float
    attention: float
    memory_bound: float
    tensor: float
    pipeline: float
    data: float
    bubble: float
    optimizer: float

    @property
    def total(self) -> float:
        """The seconds of the step."""
        return float(sum(getattr(self, field.name) for field in fields(self)))


@dataclass(frozen=True)
class SimulatedStep:
    """A step of all pipeline ranks (tensor and data rank 0): when what happens, and what each rank spends it on."""

    schedule: Schedule
    timelines: tuple[RankTimeline, ...]
    simulation: Simulation
    ranks: tuple[RankSeconds, ...]

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return self.simulation.seconds

    def segment(self, rank: int, done: Pass) -> Segment:
        """What a pass of a pipeline rank does."""
        return self.timelines[rank].segment(done, self.schedule.micro_batches)


def simulate_step(
    roles: Sequence[Role], reports: Sequence[RankReport], parallel: ParallelConfig, world: int, machine: Machine
) -> SimulatedStep:
    """Put together the rehearsed ranks of every role, each with a timeline, as if all ranks of a role were like it."""
    by_rank = {rank: report for role, report in zip(roles, reports, strict=True) for rank in role.pipeline_ranks}
    timelines = tuple(_timeline(by_rank[rank]) for rank in range(parallel.pipeline))
    schedule = Schedule(parallel.pipeline, reports[0].micro_batches, parallel.virtual_pipeline)
    times = OperationTimes(machine)
    places = [global_rank(parallel, world, rank) for rank in range(parallel.pipeline)]
    nbytes = [_sent(by_rank[rank]) for rank in range(parallel.pipeline)]

    def seconds(rank: int, done: Pass) -> float:
        """Of a pass by itself."""
        return timelines[rank].segment(done, schedule.micro_batches).alone.seconds

    def transfer(sender: int, receiver: int) -> float:
        """From one pipeline rank to another."""
        return times.transfer(nbytes[sender], places[sender], places[receiver])

    programs = [_program(timeline, schedule, rank) for rank, timeline in enumerate(timelines)]
    found = simulate(programs, seconds, transfer, record=True)
    ranks = (_rank_seconds(timeline, schedule, rank, found) for rank, timeline in enumerate(timelines))
    return SimulatedStep(schedule, timelines, found, tuple(ranks))


def _timeline(report: RankReport) -> RankTimeline:
    assert report.timeline is not None
    return report.timeline


def _sent(report: RankReport) -> int:
    """Bytes of a transfer to a neighbour."""
    return next((transfer.nbytes for transfer in report.transfers if transfer.kind == "send"), 0)


def _program(timeline: RankTimeline, schedule: Schedule, rank: int) -> Iterator[Task]:
    """All that a pipeline rank does in the step; passes as one task, unless something in them concerns other passes."""
    yield from _named(timeline.start, "start of the step")
    for item in schedule.order(rank):
        if isinstance(item, Pass) and (segment := timeline.segment(item, schedule.micro_batches)).goes_on:
            yield from _named(segment, pass_name(item))
        else:
            yield item
    yield from _named(timeline.finish, "gradients and optimizer step")


def pass_name(done: Pass) -> str:
    """A pass for people."""
    return f"{'backward' if done.backward else 'forward'} {done.micro_batch}" + f".{done.chunk}" * bool(done.chunk)


def _named(segment: Segment, name: str) -> Iterator[Task]:
    return (Work(name, task.seconds) if isinstance(task, Work) else task for task in segment.tasks)


def _rank_seconds(timeline: RankTimeline, schedule: Schedule, rank: int, found: Simulation) -> RankSeconds:
    spent: Counter[str] = Counter()
    tensor = found.ranks[rank].get("tensor", 0.0)
    for done in schedule.order(rank):
        if isinstance(done, Pass):
            segment = timeline.segment(done, schedule.micro_batches)
            spent.update(segment.spent)
            tensor += 0.0 if segment.goes_on else segment.alone.ranks[0].get("tensor", 0.0)
    waited = found.ranks[rank]
    once = sum(sum(segment.spent.values()) for segment in (timeline.start, timeline.finish))
    return RankSeconds(
        matmul=spent["matmul"],
        attention=spent["attention"],
        memory_bound=spent["memory_bound"],
        tensor=tensor,
        pipeline=waited["pipeline"],
        data=waited.get("data", 0.0),
        bubble=waited["bubble"],
        optimizer=once + waited.get("model", 0.0),
    )
