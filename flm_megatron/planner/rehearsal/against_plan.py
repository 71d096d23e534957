"""A plan beside what rehearsed ranks did in a step: memory, arithmetic, transfers.

Both count what is allocated, without the driver and fragmentation, and operations as they are done. Arithmetic and
transfers are whole numbers that have to be equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from flm_megatron.planner.cost.flops import step_flops
from flm_megatron.planner.cost.memory import GIB, rank_memory
from flm_megatron.planner.cost.traffic import by_kind, step_traffic
from flm_megatron.planner.layout import Workload
from flm_megatron.planner.plan import RunPlan
from flm_megatron.planner.report.text import table
from flm_megatron.planner.report.traffic import Traffic, traffic_data

if TYPE_CHECKING:
    from flm_megatron.planner.rehearsal.rank import RankReport
    from flm_megatron.planner.rehearsal.stage import StageRehearsal

Key = TypeVar("Key")


@dataclass(frozen=True)
class RoleCheck:
    """What one pipeline rank, which stands for its role, was planned to do in a step, and what it did: bytes held at
    the peak, operations by what they are, transfers by kind and number of ranks."""

    stage: str
    role: str
    pipeline_rank: int
    planned: int
    rehearsed: int
    planned_flops: Mapping[str, int]
    flops: Mapping[str, int]
    planned_traffic: Traffic
    traffic: Traffic

    @property
    def difference(self) -> float:
        """Share that the planned memory is above the rehearsal's."""
        return self.planned / self.rehearsed - 1

    @property
    def differing_flops(self) -> list[str]:
        """Kinds of operations of which there are not as many as planned."""
        return _differing(self.planned_flops, self.flops)

    @property
    def differing_traffic(self) -> list[tuple[str, int]]:
        """Kinds and numbers of ranks of transfers whose count or bytes are not as planned."""
        return _differing(self.planned_traffic, self.traffic)


def compare(plan: RunPlan, rehearsed: Sequence[StageRehearsal]) -> list[RoleCheck]:
    """Every role of every stage that was rehearsed."""
    return [
        check_role(stage.work, report, stage.name, role.name)
        for stage, found in zip(plan.stages, rehearsed, strict=True)
        for role, report in zip(found.roles, found.reports, strict=True)
    ]


def check_role(work: Workload, report: RankReport, stage: str, role: str) -> RoleCheck:
    """One rank beside the plan of its workload."""
    rank = report.pipeline_rank
    return RoleCheck(
        stage=stage,
        role=role,
        pipeline_rank=rank,
        planned=round(rank_memory(work, rank).total),
        rehearsed=max(report.building.nbytes, report.peak.nbytes),  # masks and validation are not planned
        planned_flops=step_flops(work, rank),
        flops=report.flops,
        planned_traffic=by_kind(step_traffic(work, rank)),
        traffic=report.traffic(),
    )


def verification_text(roles: Sequence[RoleCheck]) -> str:
    """A table of both, with a line for every figure that differs."""
    rows = [["stage", "role", "pipeline rank", "planned", "rehearsed", "difference", "FLOPs", "transfers"]]
    for role in roles:
        sizes = [f"{role.planned / GIB:.2f}", f"{role.rehearsed / GIB:.2f}", f"{100 * role.difference:+.1f}%"]
        others = [
            f"{len(names)} differ" if names else "equal" for names in (role.differing_flops, role.differing_traffic)
        ]
        rows.append([role.stage, role.role, str(role.pipeline_rank), *sizes, *others])
    title = "GiB at the peak, planned (without the allowance) and rehearsed; FLOPs and transfers of a step"
    return "\n".join([title, table(rows), *(line for role in roles for line in _differences(role))])


def verification_data(roles: Sequence[RoleCheck]) -> list[dict[str, object]]:
    """The same as plain data: bytes, operations, counts."""
    return [
        {
            "stage": role.stage,
            "role": role.role,
            "pipeline_rank": role.pipeline_rank,
            "planned": role.planned,
            "rehearsed": role.rehearsed,
            "flops": {"planned": dict(role.planned_flops), "rehearsed": dict(role.flops)},
            "transfers": {"planned": traffic_data(role.planned_traffic), "rehearsed": traffic_data(role.traffic)},
        }
        for role in roles
    ]


def _differing(planned: Mapping[Key, object], found: Mapping[Key, object]) -> list[Key]:
    return [key for key in {**planned, **found} if planned.get(key) != found.get(key)]


def _differences(role: RoleCheck) -> Iterator[str]:
    name = f"{role.stage}, {role.role}"
    for what in role.differing_flops:
        yield f"{name}: {role.planned_flops.get(what, 0):,} FLOPs of {what} planned, {role.flops.get(what, 0):,} done"
    for kind, ranks in role.differing_traffic:
        planned, done = (_said(traffic.get((kind, ranks))) for traffic in (role.planned_traffic, role.traffic))
        yield f"{name}: {kind} of {ranks} ranks: {planned} planned, {done} done"


def _said(transfers: tuple[int, int] | None) -> str:
    return "none" if transfers is None else f"{transfers[0]:,} of {transfers[1]:,} bytes together"
