"""A plan beside what rehearsed ranks held: both count what is allocated, without the driver and fragmentation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from flm_megatron.planner.cost.memory import GIB
from flm_megatron.planner.plan import RunPlan
from flm_megatron.planner.report.text import table

if TYPE_CHECKING:
    from flm_megatron.planner.rehearsal.stage import StageRehearsal


@dataclass(frozen=True)
class RoleMemory:
    """The bytes that one pipeline rank, which stands for its role, was planned to hold at its peak and has held."""

    stage: str
    role: str
    pipeline_rank: int
    planned: int
    rehearsed: int

    @property
    def difference(self) -> float:
        """Share that the plan is above the rehearsal."""
        return self.planned / self.rehearsed - 1


def compare(plan: RunPlan, rehearsed: Sequence[StageRehearsal]) -> list[RoleMemory]:
    """Every role of every stage that was rehearsed."""
    return list(_roles(plan, rehearsed))


def _roles(plan: RunPlan, rehearsed: Sequence[StageRehearsal]) -> Iterator[RoleMemory]:
    for stage, found in zip(plan.stages, rehearsed, strict=True):
        for role, report in zip(found.roles, found.reports, strict=True):
            memory = stage.memory[report.pipeline_rank]
            planned = round(memory.total - memory.allowance)
            yield RoleMemory(stage.name, role.name, report.pipeline_rank, planned, report.most_bytes)


def verification_text(roles: Sequence[RoleMemory]) -> str:
    """A table of both, in GiB."""
    rows = [["stage", "role", "pipeline rank", "planned", "rehearsed", "difference"]]
    for role in roles:
        sizes = [f"{role.planned / GIB:.2f}", f"{role.rehearsed / GIB:.2f}", f"{100 * role.difference:+.1f}%"]
        rows.append([role.stage, role.role, str(role.pipeline_rank), *sizes])
    return f"GiB at the peak, planned (without the allowance) and rehearsed\n{table(rows)}"


def verification_data(roles: Sequence[RoleMemory]) -> list[dict[str, object]]:
    """The same as plain data, in bytes."""
    return [asdict(role) for role in roles]
