"""Replicas of model chunks, whose gradients are reduced between them: megatron-core's DistributedDataParallel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch.distributed as dist
from torch import Tensor

from flm_megatron.config.schema import ParallelConfig
from flm_megatron.engine.types import ModelChunk, Optimizer, ReplicatedChunk, SyncFunctions


def replicate(chunks: Sequence[ModelChunk], parallel: ParallelConfig) -> list[ReplicatedChunk]:
    """The chunks under data parallelism, gradients accumulated in fp32 buffers."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=parallel.distributed_optimizer,
    )
    return [
        DistributedDataParallel(chunk.config, config, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]


def connect(chunks: Sequence[ReplicatedChunk], optimizer: Optimizer, parallel: ParallelConfig) -> None:
    """Tell the schedules how gradients are finished and which communication overlaps."""
    config = chunks[0].config
    config.finalize_model_grads_func = _finish_gradients
    config.grad_scale_func = optimizer.scale_loss
    if parallel.overlap_grad_reduce:
        config.no_sync_func = _one_or_list([chunk.no_sync for chunk in chunks])
        config.grad_sync_func = _one_or_list([chunk.start_grad_sync for chunk in chunks])
    if parallel.overlap_param_gather:
        config.param_sync_func = _one_or_list([chunk.start_param_sync for chunk in chunks])


def _finish_gradients(chunks: Sequence[ReplicatedChunk], tokens: Tensor | None = None, **options: object) -> None:
    """Sum gradients over the ranks that share them, and divide them by the number of tokens [] int32 of the world.

    The engine's own division (0.16) asks on the host whether there are any tokens; where there are none, gradients are
    zero and stay so. `tokens` is known on the last pipeline rank.
    """
    from megatron.core import parallel_state
    from megatron.core.distributed import finalize_model_grads

    finalize_model_grads(list(chunks), None, **options)
    if tokens is None:
        return
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    dist.broadcast(tokens, src=parallel_state.get_pipeline_model_parallel_last_rank(), group=pipeline)
    dist.all_reduce(tokens, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    factor = 1.0 / tokens.clamp(min=1)
    for chunk in chunks:
        chunk.scale_gradients(factor)


def finish_gathering(chunks: Sequence[ModelChunk]) -> None:
    """With overlapped gathering, weights of other ranks' ranges are updated only when the next step needs them."""
    for chunk in chunks:
        if getattr(getattr(chunk, "ddp_config", None), "overlap_param_gather", False):
            cast(ReplicatedChunk, chunk).start_param_sync(force_sync=True)


def unwrap(chunk: ModelChunk) -> ModelChunk:
    """The model inside megatron-core's wrappers."""
    from megatron.core.utils import unwrap_model

    return unwrap_model(chunk)


def _one_or_list(functions: list[Callable[..., object]]) -> SyncFunctions:
    return functions[0] if len(functions) == 1 else functions
