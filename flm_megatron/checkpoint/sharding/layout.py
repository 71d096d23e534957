"""Which regions of the logical tensors each rank of a tensor x pipeline layout holds, from the configuration alone."""

from __future__ import annotations

from flm_megatron.checkpoint.logical import Region
from flm_megatron.config.schema import ModelConfig, ParallelConfig
from flm_megatron.errors import RequestError
from flm_megatron.model.parameters import (
    EMBEDDING,
    FC1,
    FC2,
    HEAD,
    PROJECTION,
    QKV,
    ParameterSpec,
    parameter_specs,
)
from flm_megatron.model.split import padded_vocab_size, pipeline_split

SPLIT_BY_ROWS = (QKV, FC1)
SPLIT_BY_COLUMNS = (PROJECTION, FC2)


def rank_regions(
    model: ModelConfig, parallel: ParallelConfig, tensor_rank: int, pipeline_rank: int
) -> dict[str, list[Region]]:
    """Regions of every logical parameter that one rank holds: those of all its pipeline parts."""
    result: dict[str, list[Region]] = {}
    for part in range(pipeline_rank, parallel.pipeline * parallel.virtual_pipeline, parallel.pipeline):
        for name, regions in part_regions(model, parallel, tensor_rank, part).items():
            result.setdefault(name, []).extend(regions)
    return result


def part_regions(
    model: ModelConfig, parallel: ParallelConfig, tensor_rank: int, part: int, padded_vocab: int | None = None
) -> dict[str, list[Region]]:
    """Regions of every logical parameter that one tensor rank holds of one pipeline part (in order of execution).

    They are in the order in which they lie in the rank's own tensors: gate rows, then up rows. Norms and biases of
    row-parallel layers are on every tensor rank. Only the first part has the embedding, only the last one the final
    norm and the head; rows of vocabulary padding are nobody's (a rank that has nothing else gets an empty region).
    `padded_vocab` is this program's own padding if not given.
    """
    check_layout(model, parallel)
    split = pipeline_split(model.num_layers, parallel)
    padded = padded_vocab or padded_vocab_size(int(model.vocab_size or 0), parallel.tensor)
    result: dict[str, list[Region]] = {}
    for name, spec in parameter_specs(model).items():
        regions: list[Region] = []
        if spec.stacked:
            regions = _stacked(model, parallel, spec, sum(split[:part]), split[part], tensor_rank)
        elif part == (0 if name == EMBEDDING else len(split) - 1):
            in_vocabulary = name in (EMBEDDING, HEAD)
            regions = (
                _vocabulary(spec, padded // parallel.tensor, tensor_rank)
                if in_vocabulary
                else [Region.whole(spec.shape)]
            )
        if regions:
            result[name] = regions
    return result


def check_layout(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Raise RequestError, naming the tensor and the sizes, if `model` cannot be split over the layout."""
    pipeline_split(model.num_layers, parallel)
    for what, name, size in (
        ("query groups", QKV, model.query_groups),
        ("query heads", PROJECTION, model.num_attention_heads),
        ("feed-forward units", FC1, model.ffn_hidden_size),
    ):
        if size % parallel.tensor:
            raise RequestError(f"{name}.weight: its {size} {what} cannot be split over tensor size {parallel.tensor}")


def _stacked(
    model: ModelConfig, parallel: ParallelConfig, spec: ParameterSpec, first: int, count: int, rank: int
) -> list[Region]:
    module, _, kind = spec.name.rpartition(".")
    shape = spec.shape[1:]
    if module in SPLIT_BY_ROWS and kind in ("weight", "bias", "lora_b"):  # not the norms that lie in the same module
        bands = 2 if module == FC1 and model.gated else 1
        rows, band = shape[0] // bands // parallel.tensor, shape[0] // bands
        starts = [index * band + rank * rows for index in range(bands)]
        return [Region((first, start, *(0,) * len(shape[1:])), (count, rows, *shape[1:])) for start in starts]
    if module in SPLIT_BY_COLUMNS and kind in ("weight", "lora_a"):
        columns = shape[1] // parallel.tensor
        return [Region((first, 0, rank * columns), (count, shape[0], columns))]
    return [Region((first, *(0,) * len(shape)), (count, *shape))]


def _vocabulary(spec: ParameterSpec, rows: int, rank: int) -> list[Region]:
    first = min(rank * rows, spec.shape[0])
    return [Region((first, 0), (min(rows, spec.shape[0] - first), spec.shape[1]))]
