"""Which ranks of a layout are alike, so that one of them stands for all."""

from __future__ import annotations

from dataclasses import dataclass

from flm_megatron.config.rules.pipeline import pipeline_split
from flm_megatron.config.schema import ModelConfig, ParallelConfig


@dataclass(frozen=True)
class Role:
    """Pipeline ranks with the same layers in their chunks and the same ends of the model.

    `pipeline_ranks[0]` is rehearsed: of all of them it holds the most micro-batches at a time.
    """

    name: str
    pipeline_ranks: tuple[int, ...]
    layers: tuple[int, ...]


def roles(model: ModelConfig, parallel: ParallelConfig) -> list[Role]:
    """The roles of a layout, in the order of their first pipeline ranks.

    Raises:
        RequestError: the layers do not split over the pipeline as asked.
    """
    split = pipeline_split(model.num_layers, parallel)
    last = parallel.pipeline - 1
    found: dict[tuple[bool, bool, tuple[int, ...]], list[int]] = {}
    for rank in range(parallel.pipeline):
        found.setdefault((rank == 0, rank == last, tuple(split[rank :: parallel.pipeline])), []).append(rank)
    return [Role(_name(first, end), tuple(ranks), layers) for (first, end, layers), ranks in found.items()]


def global_rank(parallel: ParallelConfig, world: int, pipeline: int, tensor: int = 0, data: int = 0) -> int:
    """The rank of a place in the layout: megatron-core numbers tensor ranks first, then data, then pipeline."""
    replicas = world // parallel.model_size
    return tensor + parallel.tensor * (data + replicas * pipeline)


def _name(first: bool, last: bool) -> str:
    return "whole model" if first and last else "first" if first else "last" if last else "middle"
