"""Rules on learning from a teacher: what the run file alone can say of it."""

from __future__ import annotations

from collections.abc import Iterator

from flm_megatron.config.ranges import LARGEST_WORLD, out_of_range
from flm_megatron.config.schema import ParallelConfig, RunConfig, StageConfig
from flm_megatron.errors import RequestError

TEMPERATURES = (0.01, 100.0)
"""Beyond these the scaled logits leave what fp32 tells apart."""
SIZES = ("tensor", "pipeline", "data")


def distillation_is_bounded(run: RunConfig) -> list[str]:
    """Temperatures are within `TEMPERATURES`, weights above 0 and at most 1, and there is a teacher."""
    lines = []
    for index, stage in enumerate(run.stages):
        if (distill := stage.distill) is None:
            continue
        place = f"stages.{index}.distill"
        if not distill.teacher:
            lines.append(f"{place}.teacher is empty: name a checkpoint, or an earlier stage")
        if not TEMPERATURES[0] <= distill.temperature <= TEMPERATURES[1]:
            lines.append(f"{place}.temperature is {distill.temperature}, give a number from 0.01 to 100")
        if not 0 < distill.weight <= 1:
            lines.append(f"{place}.weight is {distill.weight}, give a share above 0 and at most 1")
    return lines


def teacher_is_trained_before(run: RunConfig) -> list[str]:
    """A stage that teaches is finished when the other begins."""
    names = [stage.name for stage in run.stages]
    return [
        f"stages.{index}.distill.teacher is stage {stage.distill.teacher!r}, which is not trained before: name an "
        "earlier stage, or a checkpoint"
        for index, stage in enumerate(run.stages)
        if stage.distill and stage.distill.teacher in names[index:]
    ]


def divergence_has_logits(run: RunConfig) -> list[str]:
    """The divergence from a teacher reads all logits of a micro-batch."""
    return [
        f"kernels.head_and_loss is fused, but stages.{index}.distill needs all logits: give separate or auto"
        for index, stage in enumerate(run.stages)
        if stage.distill and run.kernels.head_and_loss == "fused"
    ]


def teacher_layout_fits(stage: StageConfig, sequence_length: int, world_size: int | None) -> str | None:
    """The teacher's own layout is one of the stage's processes, for forward passes alone."""
    parallel = stage.distill.parallel if stage.distill else None
    return None if parallel is None else next(_misfits(parallel, sequence_length, world_size), None)


def _misfits(parallel: ParallelConfig, sequence_length: int, world_size: int | None) -> Iterator[str]:
    place = "distill.parallel"
    yield from out_of_range({f"{place}.{name}": (getattr(parallel, name), 1, LARGEST_WORLD) for name in SIZES})
    for name in ("virtual_pipeline", "context", "expert"):
        if getattr(parallel, name) != 1:
            yield f"{place}.{name} is {getattr(parallel, name)}, which a teacher cannot have: leave it out"
    if parallel.sequence and (parallel.tensor == 1 or sequence_length % parallel.tensor):
        yield (
            f"{place}.sequence is true, but data.sequence_length {sequence_length} is not split over tensor "
            f"{parallel.tensor}: set it to false, or change one of them"
        )
    product = f"{place}.tensor {parallel.tensor} x pipeline {parallel.pipeline}"
    if world_size is not None and world_size % parallel.model_size:
        yield f"the stage's {world_size} processes do not divide by {product}: change one of the three"
    elif world_size is not None and parallel.data is not None and world_size != parallel.processes:
        yield f"the stage's {world_size} processes are not {product} x data {parallel.data}: leave data out"


def require_no_teacher(stage: StageConfig, what: str) -> None:
    """Raise RequestError if the stage distils; `what` names what runs no teacher."""
    if stage.distill is not None:
        raise RequestError(f"stage {stage.name!r} distils, but {what} no teacher: set distill to null for it")


DISTILLATION_RULES = (distillation_is_bounded, teacher_is_trained_before, divergence_has_logits)
