"""Processes that share one piece of work on files: who they are, and how one's failure becomes everyone's."""

from __future__ import annotations

import datetime
import errno
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from flm_megatron.errors import FlmError, RequestError

T = TypeVar("T")
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
WAIT = datetime.timedelta(days=2)
"""Longest that a process waits for another; copying a 1T checkpoint with one process can take many hours."""


class Workers:
    """This process among those that share the work; alone unless a launcher started several.

    `torchrun` and `srun` are recognised by the variables they set (`srun` needs MASTER_ADDR and MASTER_PORT too).
    Use as a context manager: the process group that several processes need is ended with it.
    """

    def __init__(self) -> None:
        self.rank, self.size = _place()

    def __enter__(self) -> Workers:
        if self.size > 1:
            import torch.distributed

            missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
            if missing:
                raise RequestError(f"{self.size} processes were started, but {' and '.join(missing)} is not set")
            torch.distributed.init_process_group("gloo", rank=self.rank, world_size=self.size, timeout=WAIT)
        return self

    def __exit__(self, *_: object) -> None:
        if self.size > 1:
            import torch.distributed

            torch.distributed.destroy_process_group()

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's part of `items`, which every process must give in the same order."""
        return items[self.rank :: self.size]

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in order of rank; every process must call it."""
        if self.size == 1:
            return [value]
        import torch.distributed

        values: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(values, value)
        return values

    def together(self, work: Callable[[], T], only_first: bool = False) -> T | None:
        """Do `work` here (with `only_first` on rank 0 alone) and wait until all have done theirs.

        If any process failed, every process raises. A full disk becomes a RequestError.
        """
        result, failure = None, None
        if self.rank == 0 or not only_first:
            try:
                result = work()
            except Exception as error:
                failure = _explained(error)
        told = self.gather((type(failure).__name__, str(failure), getattr(failure, "status", 1)) if failure else None)
        if failure:
            raise failure
        for rank, problem in enumerate(told):
            if problem:
                other = FlmError(f"process {rank}: {problem[1] or problem[0]}")
                other.status = problem[2]
                raise other
        return result


def _explained(error: Exception) -> Exception:
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return RequestError(
            f"no room to write {error.filename or 'the destination'}: {error.strerror}; free some space"
        )
    return error


def _place() -> tuple[int, int]:
    for rank, size in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
        if rank in os.environ and size in os.environ:
            return int(os.environ[rank]), int(os.environ[size])
    return 0, 1
