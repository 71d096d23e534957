"""A step of many micro-batches from two steps of few: once the pipeline is filled each one adds as much as the last."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from flm_megatron.planner.simulation.events import Simulation, simulate
from flm_megatron.planner.simulation.schedule import Pass, Schedule

BEYOND = 4
"""Groups of micro-batches that are simulated beyond those that fill the pipeline."""
ROUNDING = 1e-9


def simulate_schedule(
    schedule: Schedule,
    seconds: Callable[[int, Pass], float],
    transfer_s: Callable[[int, int], float],
    record: bool = False,
) -> Simulation:
    """The passes and transfers of a step, without what comes before and after them."""
    programs = [schedule.order(rank) for rank in range(schedule.pipeline)]
    return simulate(programs, seconds, transfer_s, record)


def quick_simulation(
    schedule: Schedule,
    seconds: Callable[[int, Pass], float],
    transfer_s: Callable[[int, int], float],
    beyond: int = BEYOND,
) -> Simulation:
    """As `simulate_schedule`, from steps of `beyond` groups of micro-batches more than fill the pipeline.

    Exact where the others wait for the busiest rank from there on. Where it waits less with each further group, as one
    does that is little busier than they are, all micro-batches are simulated.
    """
    few = schedule.pipeline + beyond * schedule.group
    if schedule.micro_batches <= few + schedule.group:
        return simulate_schedule(schedule, seconds, transfer_s)
    short, long = (
        simulate_schedule(replace(schedule, micro_batches=count), seconds, transfer_s)
        for count in (few, few + schedule.group)
    )
    groups = (schedule.micro_batches - few) / schedule.group
    each = [_difference(before, after) for before, after in zip(short.ranks, long.ranks, strict=True)]
    steady = long.seconds - short.seconds
    if max(rank["compute"] + rank["pipeline"] for rank in each) > steady * (1 + ROUNDING):
        return simulate_schedule(schedule, seconds, transfer_s)
    ranks = [
        {name: spent + groups * more[name] for name, spent in before.items()}
        for before, more in zip(short.ranks, each, strict=True)
    ]
    return Simulation(short.seconds + groups * steady, tuple(ranks))


def _difference(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    return {name: after[name] - spent for name, spent in before.items()}
