"""Running a piece of evaluation on every rank of a layout: torchrun's ranks, this process, or local ones."""

from __future__ import annotations

import os
from typing import Any

from flm_megatron.config.schema import DistributedConfig, ParallelConfig
from flm_megatron.errors import RequestError

TIMEOUT_S = 86400
"""Ranks wait for the one that reads a terminal or prepares a task."""


def run_under(parallel: ParallelConfig, function: Any, *args: Any) -> int:
    """Call `function(*args) -> exit status` on every rank of `parallel`, its groups made; returns rank 0's status.

    A launcher's processes are used where there are some. Else one process is this one, and more are started here:
    `function` and `args` are pickled then.

    Raises:
        RequestError: the launcher's processes do not fit the layout.
        FlmError: whatever the function raised.
    """
    from flm_megatron.distributed.local_processes import run_processes
    from flm_megatron.distributed.world import launched, tool_world

    size = parallel.model_size * (parallel.data or 1)
    if launched():
        _check_world(parallel, int(os.environ["WORLD_SIZE"]))
    elif size > 1:
        return run_processes(size, under_layout, (parallel, function, args), timeout_s=TIMEOUT_S)
    with tool_world(DistributedConfig(timeout_s=TIMEOUT_S)):
        return under_layout(parallel, function, args)


def under_layout(parallel: ParallelConfig, function: Any, args: tuple[Any, ...]) -> int:
    """In a world: call `function(*args)` inside the groups of `parallel`."""
    from flm_megatron.distributed.world import layout

    # What the engine asks for (with a warning) where tensor-parallel ranks talk while they compute.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    with layout(parallel, TIMEOUT_S):
        return function(*args)


def _check_world(parallel: ParallelConfig, world: int) -> None:
    wanted = parallel.model_size * (parallel.data or 1)
    if world % parallel.model_size or (parallel.data and world != wanted):
        data = parallel.data or "any"
        raise RequestError(
            f"{world} processes were launched, but tensor {parallel.tensor} x pipeline {parallel.pipeline} x data "
            f"{data} needs {'a multiple of ' if not parallel.data else ''}{wanted}: change the sizes or the launch"
        )
