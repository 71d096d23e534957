"""Records the changes that a command with all its processes makes to the files of a folder, from its system calls."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from tests.crash.events import Event
from tests.crash.strace_text import Calls, read_calls

# Everything that can change a file or what a descriptor stands for. Calls that are not understood end the recording.
TRACED = (
    "openat open creat write pwrite64 writev pwritev pwritev2 fsync fdatasync sync syncfs rename renameat renameat2 "
    "link linkat symlink symlinkat unlink unlinkat rmdir mkdir mkdirat truncate ftruncate fallocate lseek dup dup2 "
    "dup3 fcntl close mmap copy_file_range sendfile splice clone clone3 fork vfork io_uring_setup io_submit"
)
LONGEST = 2**28
"""Bytes of one call that are written to the trace."""


def available() -> bool:
    """Whether `strace` is installed and may trace."""
    if shutil.which("strace") is None:
        return False
    return (
        subprocess.run(["strace", "-qq", "-e", "trace=none", "true"], capture_output=True, check=False).returncode == 0
    )


def record(command: Sequence[str], root: Path, timeout_s: float = 600) -> list[Event]:
    """Run a command to its end; what it and the processes that it started did to files under `root`.

    Raises:
        CalledProcessError: the command failed.
        ValueError: it did what cannot be played back, such as writing through a memory map.
    """
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace"
        options = ["-f", "--seccomp-bpf", "-qq", "-y", "-xx", "-s", str(LONGEST), "-o", str(trace)]
        subprocess.run(
            ["strace", *options, "-e", "trace=" + ",".join(TRACED.split()), *command],
            check=True,
            timeout=timeout_s,
            capture_output=True,
        )
        with trace.open(encoding="ascii") as lines:
            return events_of(lines, root)


def events_of(lines: Iterable[str], root: Path) -> list[Event]:
    """The events in the text that `strace -f -y -xx` wrote."""
    calls = Calls(str(root.resolve()))
    for call in read_calls(lines, calls.root):
        calls.take(call)
    return calls.events
