"""Joining the world of all processes, and leaving it without leftovers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

# Its functions keep, as their default argument, the world that they find when they are imported. Imported later, by a
# module that is loaded while the world is there, they would keep gloo's threads beyond destroy_process_group; such a
# thread can abort the process while the interpreter shuts down.
import torch.distributed.nn.functional  # noqa: F401

joined = False
"""Whether this process has ever been part of a world; from then on an error may concern this rank alone."""


@contextmanager
def process_group(
    backend: str, rank: int, world_size: int, timeout: timedelta | None = None, init_method: str | None = None
) -> Iterator[None]:
    """The world, made by torch's `init_process_group` with these arguments and destroyed when the block ends."""
    global joined
    dist.init_process_group(backend, init_method, timeout, world_size, rank)
    joined = True
    try:
        yield
    finally:
        dist.destroy_process_group()
