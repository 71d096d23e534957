"""A fence around what a lease protects, checked just before anything is renamed or removed under it.

A process that was stopped for longer than its lease allows is taken over, and wakes without knowing it: the renewal
notices within seconds, the fence before the very next step that would touch the other process's files.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

from flm_megatron.checkpoint.lease import file as lease_file
from flm_megatron.checkpoint.lease.holder import Holder


@dataclass(frozen=True)
class Fence:
    """The lease `file` with its holder's first line `line`; `subject` is what it protects, for messages.

    `lost` is called, just before the process ends, with the line that says who has it now.
    """

    file: Path
    line: bytes
    subject: str
    lost: Callable[[str], None] | None = None

    def check(self) -> None:
        """End this process with status 1 if the lease belongs to another. Raises OSError if the file system fails.

        A file that is gone, because somebody removed it, belongs to nobody: the renewal makes it again.
        """
        content = lease_file.read(self.file)
        if content is not None and lease_file.holder_line(content) != self.line:
            self.end(lease_file.holder_line(content))

    def end(self, other: bytes) -> NoReturn:
        """End this process, without cleaning up after it: the lease has the first line `other`."""
        text = (
            f"{self.subject} has been taken over by {Holder.from_bytes(other) or 'another process'}, which saw "
            "no sign of life of this one: it ends at once and saves nothing"
        )
        print(f"flm: {text}", file=sys.stderr, flush=True)
        if self.lost is not None:
            self.lost(text)
        os._exit(1)


_standing: list[Fence] = []


@contextmanager
def fenced(fences: Sequence[Fence]) -> Iterator[None]:
    """During the block `check_fences` checks these leases, in whatever thread of this process."""
    _standing.extend(fences)
    try:
        yield
    finally:
        for fence in fences:
            _standing.remove(fence)


def standing_fences() -> tuple[Fence, ...]:
    """The fences of this process, for a process that it starts and that works under the same leases."""
    return tuple(replace(fence, lost=None) for fence in _standing)


def check_fences() -> None:
    """End this process with status 1 if a lease that it works under belongs to another; does nothing without leases.

    Between this check and the next step a lease may still be lost, which no file system can prevent. Raises OSError if
    the file system fails.
    """
    for fence in _standing:
        fence.check()


def discard(folder: Path) -> None:
    """Remove a half-written folder, unless a lease was lost or cannot be checked: the folder may be another's then."""
    with suppress(OSError):
        check_fences()
        shutil.rmtree(folder, ignore_errors=True)
