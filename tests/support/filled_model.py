"""A model of the engine in this process, and logical tensors put into it or read out of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from flm_megatron.config.schema import ModelConfig, StageConfig
from flm_megatron.model.build import build_model
from flm_megatron.model.teleflm import TeleFLM

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing.mapping import ShardedTensor


def filled_model(model: ModelConfig, tensors: Mapping[str, torch.Tensor], **stage: Any) -> list[TeleFLM]:
    """The chunks of this rank with the values of logical `tensors`; `stage` sets fields of its StageConfig."""
    chunks = build_model(model, StageConfig(model=replace(model), **stage))
    for shard, local in _shards(chunks, lambda parameter: parameter.data):
        index, inside = _overlap(shard, tensors[shard.key].shape)
        local[inside] = tensors[shard.key][index].to(local.dtype)
    return chunks


def gradients(chunks: Iterable[TeleFLM], shapes: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gradients of this rank's shards as logical tensors of `shapes`; zero where another rank holds the shard."""
    found = {name: torch.zeros(tensor.shape) for name, tensor in shapes.items()}
    for shard, local in _shards(chunks, lambda parameter: parameter.grad):
        index, inside = _overlap(shard, found[shard.key].shape)
        found[shard.key][index] = local[inside].float().cpu()
    return found


def _shards(
    chunks: Iterable[TeleFLM], value: Callable[[torch.Tensor], torch.Tensor | None]
) -> Iterator[tuple[ShardedTensor, torch.Tensor]]:
    """Shards of all parameters, with `value(parameter)` cut and shaped like the shard."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    for chunk in chunks:
        for entry in chunk.sharded_state_dict().values():
            if not isinstance(entry, (ShardedTensor, ShardedTensorFactory)):
                continue
            local = value(entry.data)
            assert local is not None
            if isinstance(entry, ShardedTensorFactory):
                parts = entry.build_fn(entry.key, local, entry.replica_id, None)
                yield from ((part, part.data) for part in parts)
            else:
                yield entry, local


def _overlap(shard: ShardedTensor, true_shape: torch.Size) -> tuple[tuple[Any, ...], tuple[slice, ...]]:
    """Index of the shard in the logical tensor, and of what lies there in the shard: padding lies outside."""
    stacked = shard.prepend_axis_num
    starts = shard.global_offset
    sizes = (1,) * stacked + tuple(shard.local_shape)
    ends = [min(start + size, true) for start, size, true in zip(starts, sizes, true_shape, strict=True)]
    index: tuple[Any, ...] = tuple(starts[:stacked]) + tuple(
        slice(min(start, end), end) for start, end in zip(starts[stacked:], ends[stacked:], strict=True)
    )
    return index, tuple(slice(0, part.stop - part.start) for part in index[stacked:])


def seeded_batch(model: ModelConfig, batch: int, sequence: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and labels [batch, sequence] drawn over the whole vocabulary."""
    assert model.vocab_size
    drawn = torch.randint(0, model.vocab_size, (batch, sequence + 1), generator=torch.Generator().manual_seed(seed))
    return drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()
