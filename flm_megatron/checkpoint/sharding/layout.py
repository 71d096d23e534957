"""Which regions of the logical tensors each rank of a tensor x pipeline layout holds, from the configuration alone."""

from __future__ import annotations

import itertools

from flm_megatron.checkpoint.logical import Region
from flm_megatron.config.rules.pipeline import pipeline_split
from flm_megatron.config.schema import ModelConfig, ParallelConfig
from flm_megatron.errors import RequestError
from flm_megatron.model.parameters import ParameterSpec, parameter_specs


def rank_regions(
    model: ModelConfig, parallel: ParallelConfig, tensor_rank: int, pipeline_rank: int
) -> dict[str, list[Region]]:
    """Regions of every logical parameter that one rank holds: those of all its model chunks."""
    result: dict[str, list[Region]] = {}
    for chunk in range(pipeline_rank, parallel.pipeline * parallel.virtual_pipeline, parallel.pipeline):
        for name, regions in chunk_regions(model, parallel, tensor_rank, chunk).items():
            result.setdefault(name, []).extend(regions)
    return result


def chunk_regions(
    model: ModelConfig, parallel: ParallelConfig, tensor_rank: int, chunk: int, padded_vocab: int | None = None
) -> dict[str, list[Region]]:
    """Regions of every logical parameter that one tensor rank holds of one model chunk (in order of execution).

    They are in the order in which they lie in the rank's own tensors: gate rows, then up rows. Norms and biases of
    row-parallel layers are on every tensor rank. Only the first chunk has the embedding, only the last one the final
    norm and the head, or the copy of the embedding that is the head. Rows of vocabulary padding are nobody's (a rank
    that has nothing else gets an empty region). `padded_vocab` is this program's own padding if not given.
    """
    check_layout(model, parallel)
    split = pipeline_split(model.num_layers, parallel)
    layers = (sum(split[:chunk]), split[chunk])
    result: dict[str, list[Region]] = {}
    for name, spec in parameter_specs(model).items():
        if spec.stacked or chunk in {0 if place == "first" else len(split) - 1 for place in spec.places}:
            result[name] = _regions(spec, parallel.tensor, tensor_rank, layers, padded_vocab)
    return result


def check_layout(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Raise RequestError, naming the tensor and the sizes, if `model` cannot be split over the layout."""
    pipeline_split(model.num_layers, parallel)
    for name, spec in parameter_specs(model).items():
        for axis in spec.axes:
            if count := axis.indivisible(parallel.tensor):
                raise RequestError(
                    f"{name}: its {count} {axis.unit.value} cannot be split over tensor size {parallel.tensor}"
                )


def _regions(
    spec: ParameterSpec, tensor: int, rank: int, layers: tuple[int, int], padded_vocab: int | None
) -> list[Region]:
    """What tensor rank `rank` of `tensor` holds of a parameter; of a stacked one only `layers` (first, number)."""
    held = [axis.shards(tensor, rank, padded_vocab) for axis in spec.axes]
    if spec.stacked:
        held[0] = [layers]
    return [
        Region(tuple(first for first, _ in corner), tuple(count for _, count in corner))
        for corner in itertools.product(*held)
    ]
