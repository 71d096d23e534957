"""A rehearsed stage beside the plan of it on a machine: seconds of the step, and memory that the accelerator lacks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

from flm_megatron.planner.cost.memory import GIB
from flm_megatron.planner.cost.throughput import StepTime
from flm_megatron.planner.machine import Machine
from flm_megatron.planner.plan import StagePlan
from flm_megatron.planner.rehearsal.rank import RankReport
from flm_megatron.planner.rehearsal.roles import Role
from flm_megatron.planner.rehearsal.timing.step import RankSeconds, SimulatedStep
from flm_megatron.planner.report.text import table


@dataclass(frozen=True)
class StageTiming:
    """The plan of a stage, and its simulated step; none where only one rank was rehearsed."""

    machine: Machine
    plan: StagePlan
    step: SimulatedStep | None


def timing_text(timing: StageTiming, roles: Sequence[Role]) -> str:
    """What one rank of every role spends the step on, and what the plan says of its slowest rank."""
    machine, planned = timing.machine, _planned(timing.plan.step)
    if timing.step is None:
        return f"seconds of a step need one rank of every role; {planned.total:,.2f} planned on {machine.name}"
    rows = [["role", "pipeline rank", *(field.name for field in fields(RankSeconds)), "step"]]
    for role in roles:
        rank = role.pipeline_ranks[0]
        rows.append([role.name, str(rank), *_seconds(timing.step.ranks[rank])])
    rows.append(["planned", "slowest", *_seconds(planned)])
    seconds = timing.step.seconds
    return (
        f"seconds of a step on {machine.name}, {machine.node_size} to a node: {seconds:,.2f} simulated, "
        f"{planned.total:,.2f} planned ({100 * (planned.total / seconds - 1):+.1f}%)\n{table(rows)}\n"
        "tensor, pipeline and data: communication that nothing hides; optimizer: what is done once a step besides"
    )


def timing_data(timing: StageTiming) -> dict[str, object]:
    """The same as plain data, of every pipeline rank."""
    step = timing.step
    return {
        "machine": timing.machine.name,
        "planned_step_s": timing.plan.step.total,
        "planned": asdict(_planned(timing.plan.step)),
        "simulated_step_s": None if step is None else step.seconds,
        "simulated": None if step is None else [asdict(rank) for rank in step.ranks],
    }


def overfull(timing: StageTiming, name: str, roles: Sequence[Role], reports: Sequence[RankReport]) -> str | None:
    """One line on the rank that would need the most memory, if the accelerator has less."""
    needed, rank, role = max(
        (report.most_bytes + timing.plan.memory[report.pipeline_rank].allowance, report.rank, role.name)
        for role, report in zip(roles, reports, strict=True)
    )
    machine = timing.machine
    if needed / GIB <= machine.hardware.memory_gib:
        return None
    return (
        f"stage {name!r}: rank {rank} ({role}) needs {needed / GIB:.1f} GiB with what driver and fragmentation take, "
        f"{machine.name} has {machine.hardware.memory_gib:.1f}; flm plan --search shows layouts that fit"
    )


def _planned(step: StepTime) -> RankSeconds:
    compute = step.compute
    return RankSeconds(
        matmul=compute.matmul,
        attention=compute.attention,
        memory_bound=compute.memory_bound,
        tensor=compute.tensor,
        pipeline=step.pipeline,
        data=step.data,
        bubble=step.bubble,
        optimizer=step.optimizer,
    )


def _seconds(rank: RankSeconds) -> list[str]:
    values = [getattr(rank, field.name) for field in fields(RankSeconds)]
    return [f"{value:,.3g}" if value < 100 else f"{value:,.1f}" for value in [*values, rank.total]]
