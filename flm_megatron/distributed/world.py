"""Process groups: joining the world, and laying out tensor, pipeline and data parallel groups in it."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from types import TracebackType

import torch.distributed as dist

from flm_megatron.config.schema import DistributedConfig, ParallelConfig
from flm_megatron.device import current
from flm_megatron.distributed.layout_groups import LayoutGroups
from flm_megatron.distributed.process_group import process_group
from flm_megatron.engine import parallel_state
from flm_megatron.engine.prepare import prepare


def launched() -> bool:
    """Whether a launcher such as torchrun started this process as a rank of a world."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


@contextmanager
def world(config: DistributedConfig, rank: int = -1, size: int = -1, store: str = "env://") -> Iterator[None]:
    """The world of all processes, from the environment (torchrun) or from a shared file; left when the block ends."""
    prepare()
    timeout = timedelta(seconds=config.timeout_s)
    with process_group(current().backend, init_method=store, timeout=timeout, rank=rank, world_size=size):
        yield


@contextmanager
def lone_world(config: DistributedConfig) -> Iterator[None]:
    """A world of this process alone."""
    with tempfile.TemporaryDirectory() as folder, world(config, 0, 1, f"file://{Path(folder) / 'store'}"):
        yield


@contextmanager
def tool_world(config: DistributedConfig) -> Iterator[None]:
    """The world of a tool that runs a model: torchrun's, or without a launcher one of this process."""
    with world(config) if launched() else lone_world(config):
        yield


@contextmanager
def layout(parallel: ParallelConfig, timeout_s: int) -> Iterator[LayoutGroups]:
    """megatron-core's groups for one stage, whose collectives time out after `timeout_s` seconds.

    They are destroyed when the block ends well, so that the next stage may differ. After an error they stay until the
    world is left: other ranks may be waiting in them and should hear the reason before their connections break.
    """
    gc.collect()  # the model before lies in cycles, and its memory is wanted for the next
    groups = LayoutGroups(timedelta(seconds=timeout_s))
    with groups.installed():
        parallel_state.initialize_model_parallel(parallel)
    try:
        yield groups
    finally:
        parallel_state.destroy_model_parallel()
    groups.destroy()


class SecondLayout:
    """Another layout of the world beside the current one, for a model that runs between the steps of the first.

    `with second():` makes it the engine's current layout during the block; every rank enters at the same place.
    """

    def __init__(self, parallel: ParallelConfig, groups: LayoutGroups) -> None:
        """Inside a layout, whose `groups` it shares where sets of ranks are the same and which destroy its own."""
        first = parallel_state.known_layout()
        parallel_state.destroy_model_parallel()
        try:
            with groups.installed():
                parallel_state.initialize_model_parallel(parallel)
            self._known = parallel_state.known_layout()
        finally:
            parallel_state.set_layout(first)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """The second layout is the current one during the block."""
        first = parallel_state.known_layout()
        parallel_state.set_layout(self._known)
        try:
            yield
        finally:
            parallel_state.set_layout(first)


@contextmanager
def one_process() -> Iterator[None]:
    """A world of this process alone, with groups for one model."""
    config = DistributedConfig()
    with lone_world(config), layout(ParallelConfig(), config.timeout_s):
        yield


class Layouts:
    """Layouts over one world, one at a time: `self(parallel)` makes one, or keeps the previous one if it is equal."""

    def __init__(self, timeout_s: int) -> None:
        self._timeout_s = timeout_s
        self._open = ExitStack()
        self._parts: tuple[int, ...] = ()
        self._groups: LayoutGroups | None = None

    @contextmanager
    def __call__(self, parallel: ParallelConfig) -> Iterator[None]:
        """The groups of `parallel` during a block, which must not be nested; all ranks of the world call."""
        parts = (parallel.tensor, parallel.pipeline, parallel.virtual_pipeline)
        if parts != self._parts:
            self._open.close()
            self._parts = ()
            self._groups = self._open.enter_context(layout(parallel, self._timeout_s))
            self._parts = parts
        yield

    def beside(self, parallel: ParallelConfig) -> SecondLayout:
        """Another layout that lasts as long as the current one; all ranks of the world call."""
        assert self._groups is not None, "there is no layout to be beside"
        return SecondLayout(parallel, self._groups)

    def __enter__(self) -> Layouts:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, traceback)


def is_main_rank() -> bool:
    """Whether this is the rank that logs and prints for the run."""
    return dist.get_rank() == 0
