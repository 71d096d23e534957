"""Where a run continues: which stage, which step, from which checkpoint, and with which model."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

from flm_megatron.checkpoint.files.manifest import read_manifest
from flm_megatron.checkpoint.lease.fence import check_fences
from flm_megatron.checkpoint.logical import LogicalCheckpoint
from flm_megatron.checkpoint.manifest import Manifest
from flm_megatron.checkpoint.opening import open_checkpoint
from flm_megatron.checkpoint.stage_manifest import manifest_model
from flm_megatron.checkpoint.store import CheckpointStore
from flm_megatron.config.budget import stage_budgets
from flm_megatron.config.history import History
from flm_megatron.config.same_model import differences
from flm_megatron.config.schema import RunConfig, StageConfig
from flm_megatron.config.stage_names import stage_index
from flm_megatron.durable import sync
from flm_megatron.errors import DamagedError, RequestError
from flm_megatron.growth.boundary import boundary_scale, grown_checkpoint, resumed_plan, saved_plan, source_model
from flm_megatron.growth.certificate.forward import Layout, patient_processes
from flm_megatron.growth.certificate.measure import boundary_certificate, boundary_distances, boundary_importance
from flm_megatron.growth.change import ShapeChange
from flm_megatron.growth.foreseen import foreseen_plan
from flm_megatron.growth.opening import OpeningMasks
from flm_megatron.growth.plan import GrowthPlan
from flm_megatron.growth.record import Certificate
from flm_megatron.growth.schedule import all_masks
from flm_megatron.growth.shrink.boundary import resumed_shrinking, shrunk_checkpoint, unmeasured_checkpoint
from flm_megatron.growth.shrink.plan import ShrinkPlan
from flm_megatron.storage.path import location
from flm_megatron.training.resume.continuation import (
    continued,
    first_history,
    is_finished,
    known_history,
    past_history,
    stage_and_step,
    stage_of,
)
from flm_megatron.training.resume.first_checkpoint import first_checkpoint
from flm_megatron.training.resume.live import LiveBoundary

MADE = ("checkpoints", "metrics.jsonl", "log.txt", "goodput.jsonl", "tensorboard", "trackers", "branches")
"""Names in the output folder that a run makes and continues with."""


@dataclass(frozen=True)
class Start:
    """The next stage to train, of which `step` steps are done.

    `source` is loaded first: the stage's own checkpoint if it `resumes`, else the last one of the stage before or the
    first stage's initial checkpoint; none means fresh weights, or copies in memory if it `resumes`. `passed_over` says
    why each newer checkpoint was not used, `taken` lists the names of the stage's checkpoints. `history` is the run's
    history, whose last segment is the one that begins or continues.
    """

    stage: int
    step: int
    source: Path | None
    resumes: bool
    passed_over: tuple[str, ...] = ()
    taken: tuple[str, ...] = ()
    history: History = ()


def checkpoint_store(run: RunConfig) -> CheckpointStore:
    """The run's checkpoints."""
    return CheckpointStore(Path(run.output) / "checkpoints")


def has_checkpoints(run: RunConfig) -> bool:
    """Whether the run has checkpoints, whole or not; if so it continues and does not begin anew."""
    return any(checkpoint_store(run).newest(stage.name) for stage in run.stages)


def set_aside(run: RunConfig) -> list[Path]:
    """Rename what an earlier run left in the output folder to `NAME.before-N`, so that a run can begin anew.

    Returns the new names; nothing is removed.
    """
    output = Path(run.output)
    made = [path for name in MADE if (path := output / name).exists()]
    number = next(n for n in count(1) if not any(path.with_name(f"{path.name}.before-{n}").exists() for path in made))
    check_fences()
    renamed = [path.rename(path.with_name(f"{path.name}.before-{number}")) for path in made]
    if renamed:  # the disk must hold the new names before the new run makes the old ones again
        sync(output)
    return renamed


def find_start(run: RunConfig, only: str | None = None) -> Start | None:
    """The stage that comes next, from the newest whole checkpoint; none if all stages (or the stage `only`) are done.

    Raises:
        RequestError: `only` is not a stage, or the stage before it is not finished; or there are checkpoints that this
            program cannot read.
        DamagedError: there are checkpoints, and all of them are damaged.
    """
    wanted = [stage.name for stage in run.stages]
    if only is not None:
        wanted = wanted[: stage_index(run, only) + 1]
    store = checkpoint_store(run)
    path, damaged = store.search(wanted)
    start = _after(run, path or _branching_point(run))
    if start.stage >= len(wanted):
        return None
    start = replace(start, passed_over=tuple(map(str, damaged)), taken=store.taken(wanted[start.stage]))
    if only and wanted[start.stage] != only:
        missing = wanted[start.stage]
        raise RequestError(f"stage {only!r} needs stage {missing!r} to be finished: train it first")
    return start


def run_history(run: RunConfig) -> History:
    """The history in the newest checkpoint of a run; none if it has no checkpoint. Raises as `find_start`."""
    path = checkpoint_store(run).latest([stage.name for stage in run.stages])
    return known_history(run, _manifest(path), str(path)) if path else ()


def newest_manifest(run: RunConfig) -> Manifest:
    """The manifest of the run's newest checkpoint that has a whole one; an empty one if there is none.

    Nothing else of the checkpoint is looked at.

    Raises:
        RequestError: the disk does not answer, or it is of a newer version.
    """
    store = checkpoint_store(run)
    for path in (path for stage in reversed(run.stages) for path in store.newest(stage.name)):
        with suppress(DamagedError):
            if (manifest := read_manifest(path)) is not None:
                return manifest
    return Manifest()


def _branching_point(run: RunConfig) -> Path | None:
    """The checkpoint that a branch starts from; none for any other run.

    Raises:
        RequestError: it is not there.
    """
    if run.checkpoint.branch_of is None:
        return None
    path = Path(run.checkpoint.branch_of)
    if read_manifest(path) is None:
        raise RequestError(f"checkpoint.branch_of {path} is not a checkpoint, or no longer: branch from one that is")
    return path


def _manifest(path: Path) -> Manifest:
    """The manifest of a checkpoint of the run. Its metadata, which may take seconds to read, is not read."""
    manifest = read_manifest(path)
    assert manifest is not None, "the search passes over what has none"
    return manifest


def _refuse_other_stages(run: RunConfig) -> None:
    """A run all of whose checkpoints belong to unknown stages was renamed: it must not silently begin anew."""
    store = checkpoint_store(run)
    folders = sorted(folder.name for folder in store.root.iterdir()) if store.root.is_dir() else []
    names = [stage.name for stage in run.stages]
    if others := [name for name in folders if name not in names and store.steps(name)]:
        raise RequestError(
            f"{store.root} has checkpoints of stage {' and '.join(map(repr, others))}, but the run file's stages are "
            f"{', '.join(map(repr, names))}: name them as they were, or choose another output"
        )


def _after(run: RunConfig, path: Path | None) -> Start:
    """The stage that follows the checkpoint at `path`.

    Raises:
        RequestError: the run file asks for what cannot be continued.
    """
    if path is None:
        _refuse_other_stages(run)
        initial = run.checkpoint.initial
        return Start(0, 0, location(initial) if initial else None, resumes=False, history=first_history(run))
    manifest = _manifest(path)
    past = past_history(run, manifest, str(path))
    stage = stage_of(run, manifest, past, str(path))
    if not is_finished(run, stage, manifest, past):
        history = continued(run, stage, manifest, past, str(path))
        _, step = stage_and_step(manifest)
        check_masks_open_in_time(run, stage, step, saved_plan(manifest), history)
        return Start(stage, step, path, resumes=True, history=history)
    if stage + 1 == len(run.stages):
        return Start(stage + 1, 0, path, resumes=False)
    return Start(stage + 1, 0, path, resumes=False, history=continued(run, stage + 1, manifest, past, str(path)))


@dataclass(frozen=True)
class Beginning:
    """How a stage begins.

    The stage as it is trained (growth derives some of its model), the checkpoint that its state is loaded from, the
    growth or the shrinking it began with, and the certificate and layer distances if they were measured now. `live` is
    that checkpoint out of the memory of the ranks, if they hold it.
    """

    stage: StageConfig
    checkpoint: LogicalCheckpoint
    plan: GrowthPlan | None = None
    certificate: Certificate | None = None
    distances: tuple[float, ...] = ()
    shrinking: ShrinkPlan | None = None
    live: LogicalCheckpoint | None = None


def begin(
    run: RunConfig,
    start: Start,
    under: Layout,
    in_memory: LogicalCheckpoint | None = None,
    live: LiveBoundary | None = None,
) -> Beginning:
    """The beginning of `start` (`in_memory` if given); for a growth, layer distances and certificate are measured
    first. All of that is read from what the ranks hold of the stage before, if they do: `live`.

    Runs on all processes of the world, outside any layout; `under` makes the layouts to measure in.

    Raises:
        RequestError: the checkpoint is of another model or another growth than the run file asks for.
        FlmError: the growth changes the loss by more than the run file allows.
    """
    stage = run.stages[start.stage]
    if start.stage == 0 and not start.resumes:
        return Beginning(stage, first_checkpoint(run, stage.model, start.source))
    source = in_memory or open_checkpoint(_saved(start))
    held = live.of(source) if live else None
    if start.resumes:
        plan = resumed_plan(run, start.stage, source.manifest)
        shrinking = resumed_shrinking(run, start.stage, source.manifest)
        stage = _resumed_stage(stage, source.manifest, plan or shrinking, _where(start))
        return Beginning(stage, source, plan, shrinking=shrinking, live=held)
    if run.data.chat is not None:  # stages of a fine-tuning share one model
        return Beginning(stage, source, live=held)
    return (_grown if stage.shrink is None else _shrunk)(run, start, source, held, under)


def _grown(
    run: RunConfig, start: Start, source: LogicalCheckpoint, held: LogicalCheckpoint | None, under: Layout
) -> Beginning:
    """The beginning of a stage that grows out of the one before, or has its model."""
    distances = boundary_distances(held or source, run, start.stage, under)
    trained = boundary_scale(held or source, run, start.stage, patient_processes)
    checkpoint, plan = grown_checkpoint(source, run, start.stage, distances, trained)
    live = grown_checkpoint(held, run, start.stage, distances, trained)[0] if held else None
    certificate = boundary_certificate(live or checkpoint, run, start.stage, under)
    stage = replace(run.stages[start.stage], model=plan.new)
    return Beginning(stage, checkpoint, plan, certificate, tuple(distances or ()), live=live)


def _shrunk(
    run: RunConfig, start: Start, source: LogicalCheckpoint, held: LogicalCheckpoint | None, under: Layout
) -> Beginning:
    """The beginning of a stage that is smaller than the one before."""
    importance = boundary_importance(held or source, run, start.stage, under)
    checkpoint = shrunk_checkpoint(source, run, start.stage, importance)
    live = shrunk_checkpoint(held, run, start.stage, importance) if held else None
    certificate = boundary_certificate(live or checkpoint, run, start.stage, under)
    stage = replace(run.stages[start.stage], model=checkpoint.plan.new)
    return Beginning(stage, checkpoint, None, certificate, shrinking=checkpoint.plan, live=live)


def _saved(start: Start) -> Path:
    assert start.source is not None, "only the first stage starts from nothing"
    return start.source


def check_masks_open_in_time(run: RunConfig, index: int, step: int, plan: GrowthPlan | None, history: History) -> None:
    """Masks open over a number of steps, whatever the batch: with fewer steps before the run ends, or the next growth
    in their dimensions begins, they would stay half open.

    Raises:
        RequestError: they would.
    """
    budgets = stage_budgets(run, history)
    for masks in all_masks(plan) if plan is not None else ():
        grown_again = (i for i in range(index + 1, len(run.stages)) if _needs_open(run, i, masks))
        steps = sum(budget.steps for budget in budgets[index : next(grown_again, None)])
        if step < masks.left and steps < masks.left:
            raise RequestError(
                f"stage {run.stages[index].name!r}: growth masks open over {masks.left} steps, of which "
                f"{step} are done, but with global_batch {run.stages[index].global_batch} and sequence_length "
                f"{run.data.sequence_length} it ends after {steps}: change them when the masks are open, or raise "
                "tokens"
            )


def _needs_open(run: RunConfig, index: int, masks: OpeningMasks) -> bool:
    """Whether a later stage begins with a change of shape for which masks have to be open."""
    return run.stages[index].shrink is not None or bool(masks.grown_by(foreseen_plan(run, index).grows))


def checked_start(run: RunConfig, only: str | None = None) -> Start | None:
    """`find_start`, checked against the run file before anything of the run is written.

    Raises:
        RequestError, DamagedError: as `find_start`; or the checkpoint is of another model or growth.
    """
    start = find_start(run, only)
    if start is not None:
        with suppress(DamagedError):  # the ranks will meet it, and an older one is taken
            check_start(run, start)
    return start


def check_start(run: RunConfig, start: Start) -> None:
    """Check what `begin` refuses, as far as possible without a world: no tensor is read, no distance measured.

    Raises:
        RequestError: as `begin`.
        DamagedError: the checkpoint cannot be opened.
    """
    stage = run.stages[start.stage]
    if start.source is None or (start.stage == 0 and not start.resumes):
        first_checkpoint(run, stage.model, start.source)
        return
    source = open_checkpoint(start.source)
    if start.resumes:
        plan = resumed_plan(run, start.stage, source.manifest)
        shrinking = resumed_shrinking(run, start.stage, source.manifest)
        _resumed_stage(stage, source.manifest, plan or shrinking, _where(start))
    elif run.data.chat is None and stage.shrink is not None:
        unmeasured_checkpoint(source, run, start.stage)
    elif run.data.chat is None:
        unmeasured = [0.0] * source_model(source, run, start.stage).num_layers
        grown_checkpoint(source, run, start.stage, unmeasured)


def _where(start: Start) -> str:
    return str(start.source or "the copies in memory")


def _resumed_stage(stage: StageConfig, saved: Manifest, plan: ShapeChange | None, where: str) -> StageConfig:
    """The stage with the model of its own checkpoint; all else that may change comes from the run file."""
    if plan is not None:
        return replace(stage, model=plan.new)
    model = manifest_model(saved, where)
    if model is None:
        raise RequestError(
            f"{where}: its manifest.json does not say which model it is of, so that no run can go on from it: move it "
            "out of the run's folder (another run can start from it with checkpoint.initial)"
        )
    differing = differences(stage.model, model)
    differing += [  # which change how it is trained, or what is
        f"model.{name} is {now!r} in the run file and {before!r} in the checkpoint"
        for name, now, before in (("mup", stage.model.mup, model.mup), ("lora", stage.model.lora, model.lora))
        if now != before and not any(line.startswith(f"model.{name} ") for line in differing)
    ]
    if differing:
        raise RequestError(
            f"stage {stage.name!r} cannot go on with another model: {'; '.join(differing)}; "
            "put the values back, or start a new run with another `output`"
        )
    return stage
