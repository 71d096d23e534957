"""What a run needs and takes, before the machines are asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from flm_megatron.api.values import require_above_zero, require_whole
from flm_megatron.config.ranges import LARGEST_WORLD
from flm_megatron.config.rules import check, shape_violations
from flm_megatron.config.schema import RunConfig
from flm_megatron.errors import Mistakes
from flm_megatron.paths import FilePath, given_path, require_picture
from flm_megatron.planner.chosen_stages import only_stage, with_vocabulary
from flm_megatron.planner.feasibility import require_candidates, require_fit
from flm_megatron.planner.goodput import GoodputPlan, plan_goodput
from flm_megatron.planner.layout import as_chosen
from flm_megatron.planner.machine import Machine, find_machine
from flm_megatron.planner.plan import RunPlan, plan_run
from flm_megatron.planner.rehearsal.against_plan import RoleCheck, compare, verification_data, verification_text
from flm_megatron.planner.report.plot import plot_memory
from flm_megatron.planner.report.text import goodput_data, goodput_text, run_data, run_text
from flm_megatron.planner.search import SearchResult, search

if TYPE_CHECKING:
    from flm_megatron.planner.rehearsal.searched import LayoutCheck


@dataclass(frozen=True)
class Plan(RunPlan):
    """A run on a machine: memory of every pipeline rank, seconds of a step, time and cost of every stage and of all.

    `str(plan)` is the report that `flm plan` prints, `to_dict()` what it prints with `--json`. `goodput` has an entry
    for each stage where `mtbf`, the GPU-hours between failures of one accelerator, was given; `verified` has one for
    each role where ranks were rehearsed.
    """

    mtbf: float | None = None
    goodput: tuple[GoodputPlan, ...] = ()
    verified: tuple[RoleCheck, ...] | None = None

    def __str__(self) -> str:
        """The report."""
        texts = [run_text(self)]
        if self.mtbf is not None:
            texts.append(goodput_text(self.goodput, self.machine, self.mtbf))
        if self.verified is not None:
            texts.append(verification_text(self.verified))
        return "\n\n".join(texts)

    def to_dict(self) -> dict[str, object]:
        """Plain data: bytes, seconds, tokens."""
        data = run_data(self)
        if self.mtbf is not None:
            data |= {"goodput": goodput_data(self.goodput)}
        if self.verified is not None:
            data |= {"verified": verification_data(self.verified)}
        return data


def plan(
    run: RunConfig,
    *,
    gpu: str,
    gpus: int,
    stage: str | None = None,
    nodes_of: int | None = None,
    hardware: FilePath | None = None,
    mtbf: float | None = None,
    plot: FilePath | None = None,
    verify: bool = False,
) -> Plan:
    """Plan every stage of a run, or one `stage` alone, under the layouts of its run file.

    >>> from flm_megatron import load_run
    >>> planned = plan(load_run("run.yaml"), gpu="a800", gpus=4)
    >>> [one.steps for one in planned.stages]
    [8, 8]

    Args:
        run: as `load_run` gives it.
        gpu: kind of accelerator, such as "a800", "h100", "mi300x".
        gpus: how many.
        stage: plan this stage alone.
        nodes_of: accelerators in a node (8 unless the table differs).
        hardware: YAML file that changes what is assumed of the machine.
        mtbf: hours that one accelerator runs between failures on average, for the goodput.
        verify: rehearse one rank of every role too (`rehearse`), and put its memory, arithmetic and transfers
            beside the plan.
        plot: picture (.png, .svg) to draw of every pipeline rank's memory, also where that does not fit.

    Raises:
        RequestError: an unknown accelerator, a layout that these many cannot have, or a stage that does not fit in
            memory (the message says what would).
    """
    run, machine = planned_on(run, gpu, gpus, stage, nodes_of, hardware)
    require_above_zero("mtbf", mtbf)
    picture = None if plot is None else given_path(plot, "plot")
    if picture is not None:
        require_picture(picture, "--plot")
    check_layouts(run, gpus)
    planned = plan_run(run, machine, gpus)
    if picture is not None:
        plot_memory(planned, picture)
    require_fit(run, planned)
    goodput = () if mtbf is None else plan_goodput(planned.stages, run.checkpoint, machine, gpus, mtbf)
    verified = _verified(run, planned) if verify else None
    return Plan(**vars(planned), mtbf=mtbf, goodput=tuple(goodput), verified=verified)


def _verified(run: RunConfig, planned: RunPlan) -> tuple[RoleCheck, ...]:
    from flm_megatron.planner.rehearsal.stage import rehearse_stage

    return tuple(compare(planned, [rehearse_stage(run, stage, planned.gpus) for stage in run.stages]))


def search_layouts(
    run: RunConfig,
    *,
    gpu: str,
    gpus: int,
    stage: str | None = None,
    nodes_of: int | None = None,
    hardware: FilePath | None = None,
) -> dict[str, SearchResult]:
    """Every layout of `gpus` accelerators tried for every stage: what fits, the fastest first, and why others do not.

    Takes what `plan` takes; returns a result by the name of each stage.

    Raises:
        RequestError: an unknown accelerator, a rule on models is broken, or no layout of a stage fits.
    """
    run, machine = planned_on(run, gpu, gpus, stage, nodes_of, hardware)
    if lines := shape_violations(run):
        raise Mistakes(lines)
    length, found = run.data.sequence_length, {}
    for one in run.stages:
        found[one.name] = search(one, length, machine, gpus)
        require_candidates(one, length, machine, gpus, found[one.name])
    return found


def rehearse_layouts(
    run: RunConfig, results: Mapping[str, SearchResult], machine: Machine, top: int
) -> dict[str, list[LayoutCheck]]:
    """The `top` best layouts that `search_layouts` has found for stages of a run, rehearsed: one rank of every role of
    each, by the name of the stage. Run and machine are as `planned_on` gives them.

    Raises:
        FlmError: a layout does not run; it is named.
    """
    from flm_megatron.planner.rehearsal.searched import rehearse_candidates

    stages = {stage.name: stage for stage in run.stages}
    return {
        name: rehearse_candidates(run, stages[name], result.candidates[:top], machine)
        for name, result in results.items()
    }


def planned_on(
    run: RunConfig, gpu: str, gpus: int, stage: str | None, nodes_of: int | None, hardware: FilePath | None
) -> tuple[RunConfig, Machine]:
    """The run with the stages to plan and their vocabulary, and the machine. Raises RequestError as `plan`."""
    require_whole("gpus", gpus, LARGEST_WORLD)
    require_whole("nodes_of", nodes_of, LARGEST_WORLD)
    run = with_vocabulary(only_stage(run, stage))
    machine = find_machine(gpu, nodes_of, None if hardware is None else given_path(hardware, "hardware"))
    return run, replace(machine, software=as_chosen(machine.software, run.kernels))


def check_layouts(run: RunConfig, gpus: int) -> None:
    """The rules of the run file on that many processes. Raises Mistakes."""
    try:
        check(run, gpus)
    except Mistakes as error:
        *others, last = error.lines
        raise Mistakes([*others, f"{last}; --search tries all layouts of {gpus} GPUs"]) from None
