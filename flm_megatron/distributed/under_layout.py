"""Runs a function on every rank of a layout: in torchrun's ranks, in this process, or in processes started here."""

from __future__ import annotations

import os
from collections.abc import Callable

from flm_megatron.config.schema import DistributedConfig, ParallelConfig
from flm_megatron.errors import RequestError

PATIENT_S = 86400
"""Timeout of ranks that wait for the one that reads a terminal or prepares a task."""


def run_under(
    parallel: ParallelConfig,
    function: Callable[..., int],
    *args: object,
    timeout_s: int = PATIENT_S,
    in_fresh_processes: bool = False,
) -> int:
    """Call `function(*args) -> exit status` on every rank of `parallel`, with its groups; returns rank 0's status.

    A launcher's processes are used if there are some. Else a layout of one process uses this one (or a fresh one,
    without the memory of what ran before), and larger ones start processes here, for which `function` and `args` are
    pickled.

    Raises:
        RequestError: the launcher's processes do not fit the layout.
        FlmError: whatever the function raised.
    """
    from flm_megatron.distributed.local_processes import run_processes
    from flm_megatron.distributed.world import launched, tool_world

    if launched():
        _check_world(parallel, int(os.environ["WORLD_SIZE"]))
    elif in_fresh_processes or parallel.processes > 1:
        return run_processes(parallel.processes, _in_groups, (parallel, timeout_s, function, args), timeout_s)
    with tool_world(DistributedConfig(timeout_s=timeout_s)):
        return _in_groups(parallel, timeout_s, function, args)


def _in_groups(parallel: ParallelConfig, timeout_s: int, function: Callable[..., int], args: tuple[object, ...]) -> int:
    """In a world: call `function(*args)` inside the groups of `parallel`."""
    from flm_megatron.distributed.world import layout

    # What the engine asks for (with a warning) where tensor-parallel ranks talk while they compute.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    with layout(parallel, timeout_s):
        return function(*args)


def _check_world(parallel: ParallelConfig, world: int) -> None:
    wanted = parallel.processes
    if world % parallel.model_size or (parallel.data and world != wanted):
        data = parallel.data or "any"
        raise RequestError(
            f"{world} processes were launched, but tensor {parallel.tensor} x pipeline {parallel.pipeline} x data "
            f"{data} needs {'a multiple of ' if not parallel.data else ''}{wanted}: change the sizes or the launch"
        )
