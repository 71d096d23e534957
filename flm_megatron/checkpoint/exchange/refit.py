"""Weights pushed from ranks that train to ranks that use them under another layout, again and again by one plan."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from flm_megatron.checkpoint.exchange.description import Held, NamedRegion
from flm_megatron.checkpoint.exchange.plan import Traffic
from flm_megatron.checkpoint.exchange.transport import Moved, agreed_plan, exchange
from flm_megatron.checkpoint.regions import split_region
from flm_megatron.checkpoint.sharding.layout import check_layout, rank_regions
from flm_megatron.config.schema import ModelConfig, ParallelConfig
from flm_megatron.errors import RequestError

REGION_BYTES = 16 * 2**20


class Refit:
    """What this rank holds of the weights, and the memory that it wants weights in.

    Both are lists of (name, region, tensor of shape `region.sizes`), either may be empty, and tensors may be views of
    a model's own memory, of any dtype. All ranks of the world make one together.

    Raises:
        RequestError: (on every rank) some rank wants what no rank holds, or a tensor is held in two dtypes.
    """

    def __init__(self, held: Sequence[Held], wanted: Sequence[Held]) -> None:
        self._held = list(held)
        self._wanted = [
            (name, sub, tensor[sub.within(region).slices])
            for name, region, tensor in wanted
            for sub in split_region(region, REGION_BYTES // tensor.element_size())
        ]
        self._plan = agreed_plan(self._held, [[(name, region)] for name, region, _ in self._wanted])

    @property
    def traffic(self) -> Traffic:
        """Bytes and messages of every rank for each push."""
        return self._plan.traffic

    def push(self) -> Moved:
        """Send the values that are held now to where they are wanted, converted to the dtype there; returns what it
        took this rank. All ranks call."""
        return exchange(self._held, self._wanted, self._plan)


def rank_shards(model: ModelConfig, parallel: ParallelConfig, rank: int, ranks: int) -> list[NamedRegion]:
    """The weights that `rank` of `ranks` processes under a layout holds: names and regions.

    Ranks are numbered as megatron-core does: tensor ranks first, then data-parallel ones, then the pipeline's.

    Raises:
        RequestError: the model cannot be split so, or the layout does not divide the ranks.
    """
    check_layout(model, parallel)
    if ranks % parallel.model_size:
        raise RequestError(
            f"tensor {parallel.tensor} x pipeline {parallel.pipeline} does not divide {ranks} ranks: give as many, or "
            "a multiple"
        )
    replicas = ranks // parallel.model_size
    pipeline_rank = rank // (parallel.tensor * replicas)
    found = rank_regions(model, parallel, rank % parallel.tensor, pipeline_rank)
    return [(name, region) for name, regions in found.items() for region in regions if region.numel]


def memory_for(regions: Sequence[NamedRegion], dtypes: dict[str, torch.dtype], device: torch.device) -> list[Held]:
    """Uninitialised memory for regions, in the dtype of each tensor."""
    return [(name, region, torch.empty(region.sizes, dtype=dtypes[name], device=device)) for name, region in regions]
