"""Process groups: joining the world, and laying out tensor, pipeline and data parallel groups in it."""

from __future__ import annotations

import gc
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from flm_megatron.config.schema import DistributedConfig, ParallelConfig
from flm_megatron.device import current
from flm_megatron.distributed.layout_groups import LayoutGroups
from flm_megatron.distributed.process_group import process_group

IGNORED = (
    r"The \.grad attribute of a Tensor that is not a leaf",  # the engine probes its flat shards
    r"`torch\.distributed\.(reduce_scatter_tensor|all_gather_into_tensor)` is deprecated",  # called by the engine
    # The device sets it where there is CUDA.
    r"When using (sequence parallelism|async grad allreduce) it is recommended to set .*CUDA_DEVICE_MAX_CONNECTIONS",
)


def launched() -> bool:
    """Whether a launcher such as torchrun started this process as a rank of a world."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


@contextmanager
def world(config: DistributedConfig, rank: int = -1, size: int = -1, store: str = "env://") -> Iterator[None]:
    """The world of all processes, from the environment (torchrun) or from a shared file; left when the block ends."""
    device = current()
    device.prepare()
    _quiet_engine()
    timeout = timedelta(seconds=config.timeout_s)
    with process_group(device.backend, init_method=store, timeout=timeout, rank=rank, world_size=size):
        yield


@contextmanager
def lone_world(config: DistributedConfig) -> Iterator[None]:
    """A world of this process alone."""
    with tempfile.TemporaryDirectory() as folder, world(config, 0, 1, f"file://{Path(folder) / 'store'}"):
        yield


@contextmanager
def tool_world(config: DistributedConfig) -> Iterator[None]:
    """The world of a tool that runs a model: the one that torchrun made; without a launcher one of this process."""
    with world(config) if launched() else lone_world(config):
        yield


def _quiet_engine() -> None:
    """Ignore, in this process, exactly the warnings of torch and the engine that tell a user nothing to act on."""
    # The engine does not know our feed-forward module by name, and says so once per layer.
    logging.getLogger("megatron.core.transformer.transformer_layer").setLevel(logging.ERROR)
    for message in IGNORED:
        warnings.filterwarnings("ignore", message=message)


@contextmanager
def layout(parallel: ParallelConfig, timeout_s: int) -> Iterator[None]:
    """megatron-core's groups for one stage, whose collectives give up after `timeout_s` seconds.

    They are destroyed when the block ends well, so that the next stage may differ; after an error they stay until the
    world is left: other ranks may wait in them, and should hear why before their connections break.
    """
    from megatron.core import parallel_state

    gc.collect()  # the model before lies in cycles, and its memory is wanted for the next
    groups = LayoutGroups(timedelta(seconds=timeout_s))
    with groups.installed():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
            create_gloo_process_groups=False,
        )
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
    _forget_rotary_embeddings()
    groups.destroy()


def _forget_rotary_embeddings() -> None:
    """The engine keeps the angles of the last 32 calls, with the modules that made them and the groups of these."""
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    RotaryEmbedding.forward.cache_clear()


class Layouts:
    """Layouts over one world, one at a time: `self(parallel)` makes one, or keeps that before where it is the same."""

    def __init__(self, timeout_s: int) -> None:
        self._timeout_s = timeout_s
        self._open = ExitStack()
        self._parts: tuple[int, ...] = ()

    @contextmanager
    def __call__(self, parallel: ParallelConfig) -> Iterator[None]:
        """The groups of `parallel` for a block, not inside another one's; all ranks of the world call."""
        parts = (parallel.tensor, parallel.pipeline, parallel.virtual_pipeline)
        if parts != self._parts:
            self._open.close()
            self._parts = ()
            self._open.enter_context(layout(parallel, self._timeout_s))
            self._parts = parts
        yield

    def __enter__(self) -> Layouts:
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.__exit__(*error)


def is_main_rank() -> bool:
    """Whether this rank speaks for the run."""
    return dist.get_rank() == 0
