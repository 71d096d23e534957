"""How layers are split over the parts of a pipeline, from sizes alone."""

from __future__ import annotations

from flm_megatron.config.schema import ParallelConfig
from flm_megatron.errors import RequestError


def divisors(number: int) -> list[int]:
    """All sizes that `number` processes or layers divide by, smallest first."""
    return [size for size in range(1, number + 1) if number % size == 0]


def pipeline_split(num_layers: int, parallel: ParallelConfig) -> list[int]:
    """Layers of each model chunk in the order of execution: pipeline x virtual_pipeline numbers.

    Part i lies on pipeline rank i mod pipeline, as its chunk i div pipeline. Without `pipeline_layers` the parts
    are as even as can be, the first ones taking what is over.

    Raises:
        RequestError: virtual parts without a pipeline, a part without a layer, or an explicit split whose length
            or sum does not fit.
    """
    if parallel.virtual_pipeline > 1 and parallel.pipeline == 1:
        raise RequestError(
            f"virtual_pipeline {parallel.virtual_pipeline} needs a pipeline of at least 2, not {parallel.pipeline}; "
            "set virtual_pipeline to 1 or raise pipeline"
        )
    parts = parallel.pipeline * parallel.virtual_pipeline
    sizes = f"pipeline {parallel.pipeline} x virtual_pipeline {parallel.virtual_pipeline}"
    if parallel.pipeline_layers is not None:
        return _explicit_split(num_layers, parallel.pipeline_layers, parts, sizes)
    if num_layers < parts:
        raise RequestError(
            f"{num_layers} layers cannot be split into {parts} parts ({sizes}) of at least one layer each; "
            "use a shorter pipeline or more layers"
        )
    each, over = divmod(num_layers, parts)
    return [each + (part < over) for part in range(parts)]


def _explicit_split(num_layers: int, split: list[int], parts: int, sizes: str) -> list[int]:
    if len(split) != parts:
        raise RequestError(f"pipeline_layers {split} has {len(split)} numbers, but {sizes} makes {parts} parts")
    if min(split) < 1:
        raise RequestError(f"pipeline_layers {split} leaves a part without a layer; give each at least 1")
    if sum(split) != num_layers:
        raise RequestError(f"pipeline_layers {split} adds up to {sum(split)}, but the model has {num_layers} layers")
    return list(split)
