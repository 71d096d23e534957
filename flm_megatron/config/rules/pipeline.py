"""How layers are split over the model chunks of a pipeline, from sizes alone."""

from __future__ import annotations

from flm_megatron.config.schema import ParallelConfig
from flm_megatron.errors import RequestError


def divisors(number: int) -> list[int]:
    """All sizes that `number` processes or layers divide by, smallest first."""
    return [size for size in range(1, number + 1) if number % size == 0]


def pipeline_split(num_layers: int, parallel: ParallelConfig) -> list[int]:
    """Layers of each model chunk in the order of execution: pipeline x virtual_pipeline numbers.

    Chunk i lies on pipeline rank i mod pipeline, as its own chunk i div pipeline. Without `pipeline_layers` they
    are as even as can be, the first ones taking what is over. Only a single chunk may be without a layer.

    Raises:
        RequestError: a virtual pipeline without a pipeline, a chunk without a layer, or an explicit split whose length
            or sum does not fit.
    """
    if parallel.virtual_pipeline > 1 and parallel.pipeline == 1:
        raise RequestError(
            f"virtual_pipeline {parallel.virtual_pipeline} needs a pipeline of at least 2, not {parallel.pipeline}; "
            "set virtual_pipeline to 1 or raise pipeline"
        )
    chunks = parallel.pipeline * parallel.virtual_pipeline
    sizes = f"pipeline {parallel.pipeline} x virtual_pipeline {parallel.virtual_pipeline}"
    if parallel.pipeline_layers is not None:
        return _explicit_split(num_layers, parallel.pipeline_layers, chunks, sizes)
    if num_layers < chunks and chunks > 1:
        raise RequestError(
            f"{num_layers} layers cannot be split into {chunks} model chunks ({sizes}) of at least one layer each; "
            "use a shorter pipeline or more layers"
        )
    each, over = divmod(num_layers, chunks)
    return [each + (chunk < over) for chunk in range(chunks)]


def _explicit_split(num_layers: int, split: list[int], chunks: int, sizes: str) -> list[int]:
    if len(split) != chunks:
        raise RequestError(f"pipeline_layers {split} has {len(split)} numbers, but {sizes} makes {chunks} model chunks")
    if min(split) < 1:
        raise RequestError(f"pipeline_layers {split} leaves a model chunk without a layer; give each at least 1")
    if sum(split) != num_layers:
        raise RequestError(f"pipeline_layers {split} adds up to {sum(split)}, but the model has {num_layers} layers")
    return list(split)
