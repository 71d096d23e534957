"""Writing a checkpoint grown into the next stage of a run."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from flm_megatron.api.checkpoint import given_checkpoint
from flm_megatron.api.shape.on_text import certified_on_text, changing_world
from flm_megatron.checkpoint.logical import LogicalCheckpoint
from flm_megatron.config.schema import GrowthConfig, RunConfig, StageConfig
from flm_megatron.config.stage_names import stage_index
from flm_megatron.distributed.processes import Processes
from flm_megatron.distributed.world import Layouts
from flm_megatron.errors import RequestError
from flm_megatron.growth.boundary import boundary_scale, grown_checkpoint, needs_distances
from flm_megatron.growth.certificate.forward import Layout
from flm_megatron.growth.certificate.measure import boundary_distances
from flm_megatron.growth.distance import read_distances
from flm_megatron.growth.foreseen import check_run_file
from flm_megatron.growth.offline import write_changed
from flm_megatron.growth.plan import GrowthPlan
from flm_megatron.growth.record import Certificate
from flm_megatron.paths import FilePath, given_path, require_folder
from flm_megatron.storage.path import given_location


@dataclass(frozen=True)
class Growth:
    """A grown checkpoint that was written: where, how it was made, and what was measured."""

    path: Path
    plan: GrowthPlan
    logical_hash: str
    """Of all tensors, weights and optimizer; the same under any layout and number of processes."""
    certificate: Certificate | None


def grow(
    checkpoint: FilePath | LogicalCheckpoint,
    run: RunConfig,
    stage: str,
    out: FilePath,
    *,
    certify: FilePath | None = None,
    distances: FilePath | Sequence[float] | None = None,
    on_certificate: Callable[[Certificate], None] | None = None,
) -> Growth:
    """Write `checkpoint`, of the stage before, grown into `stage` of `run` to the new folder `out`.

    Without `certify`, and unless layers are chosen by distance, no model is built: torchrun or srun may start any
    number of processes on CPU hosts, which share the work and all call.

    Args:
        checkpoint: folder, or an open checkpoint.
        run: as `load_run` gives it.
        stage: name of the stage to grow into.
        out: folder to write; it must not exist.
        certify: text file on which logits and loss are compared before anything is written.
        distances: of each old layer, or the file that `flm distance --out` wrote; measured on the run's validation
            text where layers are chosen by distance and none are given, refused where they are chosen otherwise.
        on_certificate: called with the certificate before anything is written, on the first process.

    Raises:
        RequestError: the growth cannot be done as asked, or `out` cannot be written.
        DamagedError: the checkpoint cannot be read.
        FlmError: growth changes the loss by more than the run file allows.
    """
    from flm_megatron.training.resume.saved_defaults import with_saved_defaults

    out = given_location(out, "out")
    require_folder(out, "--out")
    check_run_file(run)
    index, source = stage_index(run, stage), given_checkpoint(checkpoint)
    run = with_saved_defaults(run, source.manifest)
    if distances is not None:
        _require_choice_by_distance(run.stages[index])
    measures = needs_distances(run, index) and distances is None
    with changing_world(run, certify is not None or measures), Layouts(run.distributed.timeout_s) as under:
        chosen = _distances(distances, run, index, source, under) if needs_distances(run, index) else None
        trained = boundary_scale(source, run, index, Processes)
        opened, plan = grown_checkpoint(source, run, index, chosen, trained)
        certificate = certified_on_text(certify, run, index, opened, under, on_certificate)
        manifest = write_changed(opened, out, Processes(), certificate)
    return Growth(out, plan, manifest.logical_hash, certificate)


def _require_choice_by_distance(stage: StageConfig) -> None:
    """Refuse distances by which no layer would be chosen. Raises RequestError."""
    selection = (stage.growth or GrowthConfig()).selection
    if selection != "distance":
        raise RequestError(
            f"distances are given, but growth.layer_selection of stage {stage.name!r} is `{selection}`: set it to "
            "distance, or leave them out"
        )


def _distances(
    given: FilePath | Sequence[float] | None,
    run: RunConfig,
    index: int,
    source: LogicalCheckpoint,
    under: Layout,
) -> Sequence[float] | None:
    """Given, read from a file, or measured on the run's validation text."""
    growth = run.stages[index].growth
    if given is None:
        return boundary_distances(source, run, index, under)
    if isinstance(given, str | os.PathLike):
        return read_distances(str(given_path(given, "distances")), growth.distance_metric if growth else "cosine")
    before = run.stages[index - 1].model.num_layers
    if len(given) != before:
        raise RequestError(f"distances has {len(given)} numbers: give one for each of the {before} layers before")
    return given
