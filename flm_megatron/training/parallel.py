"""Process groups: joining the world, and laying out tensor, pipeline and data parallel groups in it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from flm_megatron.config.schema import DistributedConfig, ParallelConfig
from flm_megatron.device import current
from flm_megatron.device.process_group import process_group
from flm_megatron.device.quiet import quiet_engine


def launched() -> bool:
    """Whether a launcher such as torchrun started this process as a rank of a world."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


@contextmanager
def world(config: DistributedConfig, rank: int = -1, size: int = -1, store: str = "env://") -> Iterator[None]:
    """The world of all processes, from the environment (torchrun) or from a shared file; left when the block ends."""
    device = current()
    device.prepare()
    quiet_engine()
    timeout = timedelta(seconds=config.timeout_s)
    with process_group(device.backend, init_method=store, timeout=timeout, rank=rank, world_size=size):
        yield


@contextmanager
def layout(parallel: ParallelConfig, timeout_s: int) -> Iterator[None]:
    """megatron-core's groups for one stage; destroyed when the block ends, so that the next stage may differ."""
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        distributed_timeout_minutes=max(1, timeout_s // 60),
        create_gloo_process_groups=False,
    )
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()


def is_main_rank() -> bool:
    """Whether this rank speaks for the run."""
    return dist.get_rank() == 0
