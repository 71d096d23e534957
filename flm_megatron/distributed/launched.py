"""Tools that a launcher may start as several processes, which divide the work."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from flm_megatron.distributed.process_group import process_group
from flm_megatron.distributed.processes import Processes
from flm_megatron.errors import RequestError

WAIT = datetime.timedelta(days=2)
"""Longest wait of a process for another: copying a 1T checkpoint with one process can take many hours."""


@contextmanager
def launched_processes() -> Iterator[Processes]:
    """The processes that `torchrun` or `srun` started for this program; without them this one alone.

    They are recognised by their environment variables; `srun` needs MASTER_ADDR and MASTER_PORT too. A process group
    that already exists is used as it is.
    """
    rank, size = _place()
    if size == 1 or dist.is_initialized():
        yield Processes()
        return
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise RequestError(f"{size} processes were started, but {' and '.join(missing)} is not set")
    with process_group("gloo", rank=rank, world_size=size, timeout=WAIT):
        yield Processes()


def is_first_process() -> bool:
    """Whether this process speaks for all that were started, or is the only one."""
    return (dist.get_rank() if dist.is_initialized() else _place()[0]) == 0


def _place() -> tuple[int, int]:
    for rank, size in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
        if rank in os.environ and size in os.environ:
            return int(os.environ[rank]), int(os.environ[size])
    return 0, 1
