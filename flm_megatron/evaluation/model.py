"""The model of a checkpoint under evaluation, under the current layout."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flm_megatron.checkpoint.sharding.layout import check_layout
from flm_megatron.checkpoint.sharding.model_state import chunks_to_evaluate
from flm_megatron.config.schema import ParallelConfig, StageConfig
from flm_megatron.evaluation.evaluated import EvaluatedCheckpoint

if TYPE_CHECKING:
    from flm_megatron.model.teleflm import TeleFLM


def load_model(evaluated: EvaluatedCheckpoint, parallel: ParallelConfig, precision: str | None = None) -> TeleFLM:
    """This rank's chunk of a checkpoint's model, ready to evaluate, growth masks as far open as they were.

    Runs inside the groups of `parallel`. Raises RequestError if the model cannot be split over them.
    """
    from flm_megatron.growth.boundary import saved_mask_value, saved_plan
    from flm_megatron.growth.schedule import mask_plan
    from flm_megatron.model.masks import GrowthMasks

    check_layout(evaluated.model, parallel)
    stage = StageConfig(model=evaluated.model, parallel=parallel, precision=precision or evaluated.precision)  # type: ignore[arg-type]
    chunks = chunks_to_evaluate(evaluated.checkpoint, stage)
    plan, opening = saved_plan(evaluated.checkpoint.manifest), saved_mask_value(evaluated.checkpoint.manifest)
    if plan is not None and opening < 1:
        GrowthMasks(chunks, evaluated.model, mask_plan(plan)).set(opening)
    return chunks[0]
