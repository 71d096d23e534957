"""Where the parameters held by this process lie in the logical tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from flm_megatron.checkpoint.logical import Region
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
        """Whether this is the one copy, apart from data-parallel ones, that is stored."""
        return not any(self.replica_id[:-1])


def placements(chunks: list[torch.nn.Module]) -> list[Placement]:
    """Placements of all parameters of the model chunks of this process, wrapped for data parallelism or not.

    Rows of padding ids belong to none; a gated first feed-forward matrix has two, gate and up.
    """
    return [placement for chunk in chunks for placement in _placements(unwrap(chunk))]


def unwrap(chunk: torch.nn.Module) -> torch.nn.Module:
    """The model inside megatron-core's wrappers."""
    from megatron.core.utils import unwrap_model

    return unwrap_model(chunk)


def _placements(model: Any) -> Iterator[Placement]:
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    specs: Mapping[str, ParameterSpec] = getattr(model, "specs", {})
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    for entry in model.sharded_state_dict(metadata=metadata).values():
        if not isinstance(entry, ShardedTensor | ShardedTensorFactory) or not isinstance(
            entry.data, torch.nn.Parameter
        ):
            continue  # extra state of modules, buffers
        built = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]
        start = 0
        for sharded in built:
            local = Region((start, *(0,) * (len(sharded.local_shape) - 1)), tuple(sharded.local_shape))
            start += sharded.local_shape[0]
            placement = _placement(sharded, local, entry.data, specs.get(sharded.key))
            if placement is not None:
                yield placement


def _placement(
    sharded: Any, local: Region, parameter: torch.nn.Parameter, spec: ParameterSpec | None
) -> Placement | None:
    """The placement without padding rows; none if it has no others. `spec` is none in a model that is not ours."""
    padded = spec is not None and spec.padded
    shape = spec.shape if spec is not None and spec.padded else tuple(sharded.global_shape)
    layers = sharded.prepend_axis_num
    region = Region(tuple(sharded.global_offset), (1,) * layers + local.sizes).intersect(Region.whole(shape))
    if region is None:
        return None
    cut = Region(local.offsets, region.sizes[layers:])
    replica = sharded.replica_id if isinstance(sharded.replica_id, tuple) else (sharded.replica_id,)
    return Placement(sharded.key, shape, region, cut, parameter, replica, padded)
