"""A run rehearsed: ranks of its stages through their life at true size, before the machines are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from flm_megatron.api.plan import planned_on
from flm_megatron.api.values import require_whole
from flm_megatron.config.ranges import LARGEST_WORLD
from flm_megatron.config.schema import RunConfig
from flm_megatron.errors import RequestError
from flm_megatron.growth.foreseen import check_run_file
from flm_megatron.paths import FilePath, given_path, require_file, require_picture
from flm_megatron.planner.chosen_stages import only_stage, whole_run, with_vocabulary
from flm_megatron.planner.rehearsal.report import rehearsal_data, rehearsal_text
from flm_megatron.planner.rehearsal.stage import StageRehearsal, rehearse_stage
from flm_megatron.planner.rehearsal.timing.picture import draw_step
from flm_megatron.planner.rehearsal.timing.stage_timing import overfull
from flm_megatron.planner.rehearsal.timing.trace import write_trace


@dataclass(frozen=True)
class Rehearsal:
    """Every stage that was rehearsed. `str(rehearsal)` is the report that `flm rehearse` prints, `to_dict()` what it
    prints with `--json`."""

    stages: tuple[StageRehearsal, ...]
    written: tuple[str, ...] = ()
    """What the files show that were written."""

    def __str__(self) -> str:
        """The report."""
        return "\n\n".join([*(rehearsal_text(stage) for stage in self.stages), *self.written])

    def to_dict(self) -> dict[str, object]:
        """Plain data: bytes, operations, counts."""
        return {"stages": [rehearsal_data(stage) for stage in self.stages]}

    def require_fit(self) -> None:
        """Check that every rehearsed rank fits in the memory of the accelerator, where one was given.

        Raises:
            RequestError: one does not; the message names it, what it needs and what there is.
        """
        for stage in self.stages:
            line = stage.timing and overfull(stage.timing, stage.stage, stage.roles, stage.reports)
            if line:
                raise RequestError(line)


def rehearse(
    run: RunConfig,
    *,
    gpus: int,
    stage: str | None = None,
    rank: int | None = None,
    workers: int | None = None,
    gpu: str | None = None,
    nodes_of: int | None = None,
    hardware: FilePath | None = None,
    trace: FilePath | None = None,
    plot: FilePath | None = None,
) -> Rehearsal:
    """Run one training step of chosen ranks of the real program at true size, on this machine and without values.

    Args:
        run: as `load_run` gives it.
        gpus: processes that the run would have.
        stage: rehearse this stage alone.
        rank: rehearse this rank, not one of every role.
        workers: processes of this machine that share the work (as many as it has processors).
        gpu: kind of accelerator, such as "a800", to say how long the step takes on all pipeline ranks.
        nodes_of: accelerators in a node (8 unless the table differs).
        hardware: YAML file that changes what is assumed of the machine.
        trace: file for a Chrome trace of the step of one stage on `gpu`.
        plot: picture (.png, .svg) of that step.

    Raises:
        RequestError: a layout that these many cannot have, a rank that is not among them, or an unknown accelerator.
        FlmError: ranks would wait for each other for ever; the message has both call sites.
    """
    require_whole("gpus", gpus, LARGEST_WORLD)
    require_whole("workers", workers, LARGEST_WORLD)
    if rank is not None and not 0 <= rank < gpus:
        raise RequestError(f"rank is {rank}, but {gpus:,} processes have the ranks 0 to {gpus - 1:,}")
    _require_gpu(gpu, nodes_of=nodes_of, hardware=hardware, trace=trace, plot=plot)
    if run.data.chat is not None:
        from flm_megatron.launch.fine_tuning import without_conversations

        run = without_conversations(run)
    if gpu is None:
        chosen, machine = with_vocabulary(only_stage(run, stage)), None
    else:
        chosen, machine = planned_on(run, gpu, gpus, stage, nodes_of, hardware)
    _require_step_files(chosen, rank, trace, plot)
    check_run_file(chosen, gpus)
    run, names = whole_run(run, chosen), [one.name for one in chosen.stages]
    stages = [one for one in run.stages if one.name in names]
    found = tuple(rehearse_stage(run, one, gpus, rank, workers, machine) for one in stages)
    return Rehearsal(found, tuple(_show_step(found[0], trace, plot)))


def _require_gpu(gpu: str | None, **options: object) -> None:
    """What only a machine gives a meaning to."""
    for name, value in options.items():
        if value is not None and gpu is None:
            raise RequestError(f"{name} is {value}, but no gpu is given: say which accelerator, such as gpu a800")


def _require_step_files(run: RunConfig, rank: int | None, trace: FilePath | None, plot: FilePath | None) -> None:
    """Files can be written, and have one step of all pipeline ranks to show."""
    for name, path in (("trace", trace), ("plot", plot)):
        if path is None:
            continue
        if rank is not None:
            raise RequestError(f"{name} shows all pipeline ranks of a step: leave out rank {rank}")
        if len(run.stages) > 1:
            stages = ", ".join(one.name for one in run.stages)
            raise RequestError(f"{name} shows a step of one stage: choose one of {stages} with stage")
        (require_file if name == "trace" else require_picture)(given_path(path, name), f"--{name}")


def _show_step(found: StageRehearsal, trace: FilePath | None, plot: FilePath | None) -> Iterator[str]:
    if found.timing is None or found.timing.step is None:
        return
    machine, step = found.timing.machine, found.timing.step
    if trace is not None:
        yield f"{trace}: {write_trace(step, given_path(trace, 'trace'))}"
    if plot is not None:
        title = f"a step of {found.stage} on {found.world:,} {machine.name}: {step.seconds:,.1f} s"
        yield f"{draw_step(step, title, given_path(plot, 'plot'))}: the step of all pipeline ranks"
