"""Says in one line why a stage does not fit in memory, and what would."""

from __future__ import annotations

from flm_megatron.config.schema import RunConfig, StageConfig
from flm_megatron.errors import RequestError
from flm_megatron.planner.machine import Machine
from flm_megatron.planner.plan import RunPlan, StagePlan
from flm_megatron.planner.search import SearchResult, describe, leanest_gib, search, smallest_fit


def require_fit(run: RunConfig, plan: RunPlan) -> None:
    """Check that every stage fits in memory under the layout of the run file.

    Raises:
        RequestError: it does not; the message says what is missing and names a layout, or a number of accelerators,
            that fits.
    """
    for stage, planned in zip(run.stages, plan.stages, strict=True):
        if planned.peak_gib > plan.machine.hardware.memory_gib:
            raise RequestError(_overfull(stage, planned, run.data.sequence_length, plan.machine, plan.gpus))


def require_candidates(
    stage: StageConfig, sequence_length: int, machine: Machine, gpus: int, result: SearchResult
) -> None:
    """Check that some layout fits.

    Raises:
        RequestError: none does; the message says what is missing and the smallest number of accelerators that fits,
            or that none is enough.
    """
    if not result.candidates:
        missing = _missing(result, machine)
        raise RequestError(f"stage {stage.name!r}: {missing}{_more(stage, sequence_length, machine, gpus)}")


def _overfull(stage: StageConfig, planned: StagePlan, sequence_length: int, machine: Machine, gpus: int) -> str:
    totals = [memory.total for memory in planned.memory]
    line = (
        f"stage {stage.name!r}: pipeline rank {totals.index(max(totals))} needs {planned.peak_gib:.1f} GiB, "
        f"{machine.name} has {machine.hardware.memory_gib:.1f}"
    )
    result = search(stage, sequence_length, machine, gpus)
    if result.candidates:
        return f"{line}; fits with {describe(result.candidates[0].work)} (see --search)"
    return f"{line}; no layout of {gpus} GPUs fits{_more(stage, sequence_length, machine, gpus)}"


def _missing(result: SearchResult, machine: Machine) -> str:
    nearest = min(result.rejections.values(), key=lambda rejection: rejection.nearest_gib, default=None)
    if nearest is None or nearest.nearest_gib == float("inf"):
        example = f": {nearest.example}" if nearest else ""
        return f"no layout runs on this number of GPUs{example}"
    missing = nearest.nearest_gib - machine.hardware.memory_gib
    return (
        f"no layout fits; the nearest ({nearest.example}) needs {nearest.nearest_gib:.1f} GiB, {missing:.1f} too many"
    )


def _more(stage: StageConfig, sequence_length: int, machine: Machine, gpus: int) -> str:
    smallest = smallest_fit(stage, sequence_length, machine)
    if smallest is not None:
        fewer = ", fewer than asked for" if smallest.world_size < gpus else ""
        return f"; the smallest number of GPUs that fits is {smallest.world_size}{fewer} ({describe(smallest)})"
    least = leanest_gib(stage, sequence_length, machine)
    if least == float("inf"):
        return ""
    return (
        f"; it cannot fit on {machine.name} under any layout of any number: the leanest needs {least:.1f} GiB of "
        f"{machine.hardware.memory_gib:.1f} ({machine.context_gib:.1f} of them for the driver)"
    )
