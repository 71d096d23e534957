"""A fence around what a lease protects: looked at just before anything is renamed or removed under it.

A process that was stopped for longer than its lease allows is taken over, and wakes without knowing: its renewal finds
that out within seconds, a fence before the very next step that would touch what is the other's by then.
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
    """The lease `file` as its holder made it, with the first line `line`; `subject` is what it is for, for messages.
    `lost` is called with the line that says that another has it, just before the process ends."""

    file: Path
    line: bytes
    subject: str
    lost: Callable[[str], None] | None = None

    def check(self) -> None:
        """End this process with status 1 if the lease is another's. Raises OSError if the file system fails.

        A file that is gone, because somebody removed it, is nobody's: the renewal makes it again.
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
    """While the block runs `check_fences` looks at these leases, in whatever thread of this process."""
    _standing.extend(fences)
    try:
        yield
    finally:
        for fence in fences:
            _standing.remove(fence)


def standing_fences() -> tuple[Fence, ...]:
    """The fences of this process, for one that it starts and that works under the same leases."""
    return tuple(replace(fence, lost=None) for fence in _standing)


def check_fences() -> None:
    """End this process with status 1 if a lease that it works under is another's; nothing where it has none.

    Between this look and the step after it remains a moment in which a lease may still be lost, which no file system
    closes. Raises OSError if the file system fails.
    """
    for fence in _standing:
        fence.check()


def discard(folder: Path) -> None:
    """Remove a half-written folder, unless a lease was lost, or cannot be looked at: it may be another's then."""
    with suppress(OSError):
        check_fences()
        shutil.rmtree(folder, ignore_errors=True)
