"""Where the parameters of a model chunk lie in the logical tensors: megatron-core's ShardedTensor, read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from flm_megatron.engine import parallel_state
from flm_megatron.engine.types import ModelChunk


@dataclass(frozen=True)
class ParameterShard:
    """Rows `start` on, of `local_shape`, of a local parameter, and their place in the logical tensor `name`.

    `global_shape` (padding rows of the vocabulary included) and `global_offset` have `prepended` axes more, of layers.
    The last number of `replica_id` is the data-parallel rank; the others are 0 on the one rank that stores the shard.
    """

    name: str
    parameter: torch.nn.Parameter
    start: int
    local_shape: tuple[int, ...]
    global_shape: tuple[int, ...]
    global_offset: tuple[int, ...]
    prepended: int
    replica_id: tuple[int, ...]


def parameter_shards(chunk: ModelChunk) -> Iterator[ParameterShard]:
    """The shards of all parameters of a chunk without wrappers; a gated first feed-forward matrix has two."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group()}
    for entry in chunk.sharded_state_dict(metadata=metadata).values():
        if not isinstance(entry, ShardedTensor | ShardedTensorFactory) or not isinstance(
            entry.data, torch.nn.Parameter
        ):
            continue  # extra state of modules, buffers
        start = 0
        for sharded in entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]:
            replica = sharded.replica_id if isinstance(sharded.replica_id, tuple) else (sharded.replica_id,)
            yield ParameterShard(
                name=sharded.key,
                parameter=entry.data,
                start=start,
                local_shape=tuple(sharded.local_shape),
                global_shape=tuple(sharded.global_shape),
                global_offset=tuple(sharded.global_offset),
                prepended=sharded.prepend_axis_num,
                replica_id=replica,
            )
            start += sharded.local_shape[0]
