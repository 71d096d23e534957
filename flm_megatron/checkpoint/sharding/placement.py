"""Where the parameters held by this process lie in the logical tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from flm_megatron.checkpoint.logical import Region
from flm_megatron.engine.data_parallel import unwrap
from flm_megatron.engine.sharded_tensors import ParameterShard, parameter_shards
from flm_megatron.engine.types import ModelChunk
from flm_megatron.model.parameters import ParameterSpec


@dataclass(frozen=True)
class Placement:
    """A region of a local parameter and its place in a logical tensor.

    `region` lies in the logical tensor of `shape` (true vocabulary), `local` is the same region in `parameter`,
    with as many values but without the axis of layers; `tensor` is a view of the parameter's storage of shape
    `region.sizes`. `replica_id` is megatron-core's: its last number is the data-parallel rank, the others are 0 on
    the one rank of each data-parallel group that stores the region. Megatron-LM's checkpoints hold padding rows after
    the values of a `padded` tensor.
    """

    name: str
    shape: tuple[int, ...]
    region: Region
    local: Region
    parameter: torch.nn.Parameter
    replica_id: tuple[int, ...]
    padded: bool = False

    @property
    def tensor(self) -> torch.Tensor:
        """Its values in the parameter's own storage, of shape `region.sizes`."""
        return self.parameter.data[self.local.slices].view(self.region.sizes)

    @property
    def layer(self) -> int | None:
        """The layer that the region lies in; none outside the layers."""
        stacked = len(self.region.sizes) > len(self.local.sizes)
        return self.region.offsets[0] if stacked else None

    @property
    def main(self) -> bool:
        """Whether this is the copy that is stored, not counting data-parallel copies."""
        return not any(self.replica_id[:-1])


def placements(chunks: Sequence[ModelChunk]) -> list[Placement]:
    """Placements of all parameters of the model chunks of this process, wrapped for data parallelism or not.

    Rows of padding ids belong to none; a gated first feed-forward matrix has two, gate and up.
    """
    return [placement for chunk in chunks for placement in _placements(unwrap(chunk))]


def _placements(model: ModelChunk) -> Iterator[Placement]:
    specs: Mapping[str, ParameterSpec] = getattr(model, "specs", {})
    for shard in parameter_shards(model):
        placement = _placement(shard, specs.get(shard.name))
        if placement is not None:
            yield placement


def _placement(shard: ParameterShard, spec: ParameterSpec | None) -> Placement | None:
    """The placement without padding rows; none if it has no others. `spec` is none in a model that is not ours."""
    padded = spec is not None and spec.padded
    shape = spec.shape if spec is not None and spec.padded else shard.global_shape
    layers = (1,) * shard.prepended
    region = Region(shard.global_offset, layers + shard.local_shape).intersect(Region.whole(shape))
    if region is None:
        return None
    start = (shard.start, *(0,) * (len(shard.local_shape) - 1))
    local = Region(start, region.sizes[shard.prepended :])
    return Placement(shard.name, shape, region, local, shard.parameter, shard.replica_id, padded)
