"""Writing a checkpoint shrunk into the next, smaller stage of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from flm_megatron.api.checkpoint import given_checkpoint
from flm_megatron.api.shape.on_text import certified_on_text, changing_world
from flm_megatron.checkpoint.logical import LogicalCheckpoint
from flm_megatron.config.schema import RunConfig, ShrinkConfig
from flm_megatron.config.stage_names import stage_index
from flm_megatron.distributed.processes import Processes
from flm_megatron.distributed.world import Layouts
from flm_megatron.errors import RequestError
from flm_megatron.growth.certificate.measure import boundary_importance
from flm_megatron.growth.foreseen import check_run_file
from flm_megatron.growth.offline import write_changed
from flm_megatron.growth.record import Certificate
from flm_megatron.growth.shrink.boundary import shrunk_checkpoint, unmeasured_checkpoint
from flm_megatron.growth.shrink.plan import ShrinkPlan
from flm_megatron.paths import FilePath, given_path, require_folder
from flm_megatron.storage.path import given_location


@dataclass(frozen=True)
class Shrinking:
    """A shrunk checkpoint that was written: where, what it keeps, and what was measured."""

    path: Path
    plan: ShrinkPlan
    logical_hash: str
    """Of all tensors, weights and optimizer; the same under any layout and number of processes."""
    certificate: Certificate | None
    notice: str | None
    """One line where importance was measured on another checkpoint."""


def shrink(
    checkpoint: FilePath | LogicalCheckpoint,
    run: RunConfig,
    stage: str,
    out: FilePath,
    *,
    importance: FilePath | None = None,
    certify: FilePath | None = None,
    on_certificate: Callable[[Certificate], None] | None = None,
) -> Shrinking:
    """Write what `stage` of `run` keeps of `checkpoint`, of the larger stage before, to the new folder `out`.

    With an importance file, and without `certify`, no model is built: torchrun or srun may start any number of
    processes on CPU hosts, which share the work and all call.

    Args:
        checkpoint: folder, or an open checkpoint.
        run: as `load_run` gives it.
        stage: name of the stage to shrink into; it has a section `shrink`.
        out: folder to write; it must not exist.
        importance: file that `flm importance` wrote; else the one that the run file names, else it is measured on the
            run's validation text.
        certify: text file on which logits and loss are compared before anything is written.
        on_certificate: called with the certificate before anything is written, on the first process.

    Raises:
        RequestError: the checkpoint cannot be shrunk as asked, or `out` cannot be written.
        DamagedError: the checkpoint cannot be read.
        FlmError: the loss changes by more than the run file allows.
    """
    from flm_megatron.training.resume.saved_defaults import with_saved_defaults

    out = given_location(out, "out")
    require_folder(out, "--out")
    check_run_file(run)
    index, source = stage_index(run, stage), given_checkpoint(checkpoint)
    run, settings = _with_importance(with_saved_defaults(run, source.manifest), index, importance)
    unmeasured_checkpoint(source, run, index)  # refuses what cannot be done before anything is measured
    runs_a_model = certify is not None or settings.importance is None
    with changing_world(run, runs_a_model), Layouts(run.distributed.timeout_s) as under:
        opened = shrunk_checkpoint(source, run, index, boundary_importance(source, run, index, under))
        certificate = certified_on_text(certify, run, index, opened, under, on_certificate)
        manifest = write_changed(opened, out, Processes(), certificate)
    return Shrinking(out, opened.plan, manifest.logical_hash, certificate, opened.record.notice)


def _with_importance(run: RunConfig, index: int, importance: FilePath | None) -> tuple[RunConfig, ShrinkConfig]:
    """The run with the importance file that was given, if one was; and the stage's settings.

    Raises:
        RequestError: the stage does not shrink, or there is nothing to measure importance on.
    """
    stage = run.stages[index]
    if stage.shrink is None:
        raise RequestError(f"stage {stage.name!r} has no section shrink: add `shrink: {{}}`, or give another --stage")
    settings = stage.shrink
    if importance is not None:
        settings = replace(settings, importance=str(given_path(importance, "importance")))
    if settings.importance is None and not run.data.train:
        raise RequestError("importance is not given, and there are no data to measure it on: give --importance")
    changed = replace(stage, shrink=settings)
    return replace(run, stages=[changed if i == index else each for i, each in enumerate(run.stages)]), settings
