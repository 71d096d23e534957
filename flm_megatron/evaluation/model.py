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
    from flm_megatron.growth.boundary import masks_as_saved

    check_layout(evaluated.model, parallel)
    stage = StageConfig(model=evaluated.model, parallel=parallel, precision=precision or evaluated.precision)  # type: ignore[arg-type]
    chunks = chunks_to_evaluate(evaluated.checkpoint, stage)
    masks_as_saved(chunks, evaluated.model, evaluated.checkpoint.manifest)
    return chunks[0]
