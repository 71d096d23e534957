"""The best layouts of a search, rehearsed: each has to run, to fit, and to do what is planned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from flm_megatron.config.schema import RunConfig, StageConfig
from flm_megatron.errors import FlmError
from flm_megatron.planner.cost.memory import GIB, rank_memory
from flm_megatron.planner.machine import Machine
from flm_megatron.planner.rehearsal.against_plan import RoleCheck, check_role, verification_data
from flm_megatron.planner.rehearsal.stage import rehearse_roles
from flm_megatron.planner.report.text import table
from flm_megatron.planner.search import Candidate, describe


@dataclass(frozen=True)
class LayoutCheck:
    """A layout beside what one rank of each of its roles did. `needed_gib` is the most that one held, with the plan's
    allowance for driver and fragmentation; a device has `memory_gib`."""

    layout: str
    checks: tuple[RoleCheck, ...]
    needed_gib: float
    memory_gib: float

    @property
    def fits(self) -> bool:
        """Whether no rank held more than a device has."""
        return self.needed_gib <= self.memory_gib

    @property
    def difference(self) -> float:
        """The planned memory's largest difference from the rehearsal's, as a share."""
        return max((check.difference for check in self.checks), key=abs)


def rehearse_candidates(
    run: RunConfig, stage: StageConfig, candidates: Sequence[Candidate], machine: Machine, workers: int | None = None
) -> list[LayoutCheck]:
    """Rehearse one rank of every role of each layout of `stage`, whose vocabulary is known.

    Raises what a real rank would raise, the layout named before it.
    """
    return [_checked(run, stage, candidate, machine, workers) for candidate in candidates]


def _checked(
    run: RunConfig, stage: StageConfig, candidate: Candidate, machine: Machine, workers: int | None
) -> LayoutCheck:
    work, name = candidate.work, describe(candidate.work)
    assert work.recompute != "attention"
    stage = replace(stage, parallel=work.parallel, micro_batch=work.micro_batch, recompute=work.recompute)
    try:
        found = rehearse_roles(replace(run, stages=[stage]), stage, work.world_size, workers)
    except FlmError as error:
        raise type(error)(f"{name}: {error}") from error
    checks, needed = [], 0.0
    for role, report in zip(found.roles, found.reports, strict=True):
        memory = rank_memory(work, report.pipeline_rank, machine.context_gib, machine.fragmentation)
        needed = max(needed, report.most_bytes + memory.allowance)
        checks.append(check_role(work, report, name, role.name))
    return LayoutCheck(name, tuple(checks), needed / GIB, machine.hardware.memory_gib)


def layouts_text(layouts: Sequence[LayoutCheck]) -> str:
    """A line for each layout."""
    rows = [["layout", "roles", "GiB rehearsed", "fits", "planned", "FLOPs", "transfers"]]
    for each in layouts:
        differing = [sum(map(len, kinds)) for kinds in _differing(each)]
        rows.append(
            [
                each.layout,
                str(len(each.checks)),
                f"{each.needed_gib:.1f}",
                "yes" if each.fits else "no",
                f"{100 * each.difference:+.1f}%",
                *(f"{count} differ" if count else "equal" for count in differing),
            ]
        )
    title = f"Rehearsed: the most that a rank held, with the allowance; a device has {layouts[0].memory_gib:.1f} GiB"
    return f"{title}\n{table(rows)}"


def layouts_data(layouts: Sequence[LayoutCheck]) -> list[dict[str, object]]:
    """The same as plain data, with every role."""
    return [
        {
            "layout": each.layout,
            "needed_gib": each.needed_gib,
            "fits": each.fits,
            "roles": verification_data(each.checks),
        }
        for each in layouts
    ]


def _differing(layout: LayoutCheck) -> tuple[list[Sequence[object]], list[Sequence[object]]]:
    return [check.differing_flops for check in layout.checks], [check.differing_traffic for check in layout.checks]
