"""One writer for a folder: a lease that its holder renews, and that others respect or, once it is dead, take over.

A lease is dead when its process is gone, which is known at once on its own host, or when it was not renewed for
`SILENT_RENEWALS` intervals by the clock of the process that watches it: clocks of two hosts are never compared.
A holder that finds its lease taken over, because it was stopped or cut off from the disk, ends at once: its renewal
looks at every interval, its fence (`fence`) before each step that renames or removes anything.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from flm_megatron.checkpoint.lease import file as lease_file
from flm_megatron.checkpoint.lease.fence import Fence, fenced
from flm_megatron.checkpoint.lease.holder import this_process
from flm_megatron.checkpoint.lease.watch import RENEW_S, Watch
from flm_megatron.distributed.processes import Processes
from flm_megatron.errors import RequestError

logger = logging.getLogger(__name__)
LOOK_S = 0.2
END_S = 10.0
ROUND_S = 1.0
"""Seconds of one round in which the first process tries, while the others wait in a collective with a timeout."""


@contextmanager
def lease(
    file: Path,
    subject: str,
    advice: str,
    processes: Processes,
    patience_s: float = 0.0,
    lost: Callable[[str], None] | None = None,
    renew_s: float = RENEW_S,
) -> Iterator[None]:
    """The first of `processes`, all of which enter, holds the lease `file` until the block ends.

    `subject` is what the lease protects and `advice` what to do while another holds it, both for messages. An earlier
    start of the same job gets `patience_s` seconds to end. When the lease has been taken over, the process ends with
    status 1; `lost` is called with the line that says so just before.

    Raises:
        RequestError: another process holds it and is alive (the message says who), or the file cannot be written.
    """
    attempt = Attempt(file, subject, advice, patience_s, renew_s)
    fence = Fence(file, attempt.line, subject, lost)
    renewal = Renewal(fence, renew_s)
    try:
        while not processes.on_first(lambda: attempt.round(ROUND_S)):
            pass
        if attempt.held:
            renewal.start()
        with fenced([fence] if attempt.held else []):
            yield
    finally:
        if renewal.end() and attempt.held:
            with suppress(OSError):  # what stays is seen to be dead by the next one
                lease_file.give_up(file, attempt.line)


class Attempt:
    """A process's attempts to get a lease, until it holds it or sees that another does."""

    def __init__(self, file: Path, subject: str, advice: str, patience_s: float, renew_s: float) -> None:
        self.file, self.subject, self.advice, self.patience_s = file, subject, advice, patience_s
        self.holder = this_process(renew_s)
        self.line = self.holder.to_bytes()
        self.held = False
        self._began = time.monotonic()
        self._watches: dict[Path, Watch] = {}

    def round(self, seconds: float) -> bool:
        """Try for at least `seconds` seconds; returns whether the lease is held.

        Raises:
            RequestError: as `lease`.
        """
        deadline = time.monotonic() + seconds
        try:
            while not (self.held or self._try()) and time.monotonic() < deadline:
                time.sleep(LOOK_S)
        except OSError as error:
            raise RequestError(f"{self.file}: cannot be written: {error.strerror or error}") from error
        if self.held:
            with suppress(OSError):
                lease_file.sweep(self.file, self.line)
        return self.held

    def _try(self) -> bool:
        """One attempt: make the lease, or take over a dead one."""
        if lease_file.create(self.file, self.line):
            self.held = True
            return True
        content = lease_file.read(self.file)
        if content is not None and self._is_dead(self.file, content) and self._claim(self.file, content):
            self.held = lease_file.take_over(self.file, content, self.line)
        return self.held

    def _claim(self, file: Path, content: bytes) -> bool:
        """Make the claim on a dead lease or on an abandoned claim, which only the claim's maker may remove."""
        claim = lease_file.claim_of(file, lease_file.holder_line(content))
        if lease_file.create(claim, self.line):
            return True
        other = lease_file.read(claim)
        if other is not None and self._is_dead(claim, other) and self._claim(claim, other):
            lease_file.remove_claim(claim, other)
        return False

    def _is_dead(self, file: Path, content: bytes) -> bool:
        """Whether a lease or claim is dead as far as is known; raises RequestError if it is alive."""
        watch = self._watches.setdefault(file, Watch())
        new = watch.look(content)
        alive = watch.alive()
        waits = watch.holder is not None and watch.holder.precedes(self.holder)
        if alive and not (waits and time.monotonic() - self._began < self.patience_s):
            raise RequestError(f"{self.subject} is in use by {watch.holder}; it {alive}: {self.advice}")
        if new and not watch.is_dead():
            until = "until it has ended" if alive else f"up to {watch.silence_s:g} s to see whether it is alive"
            logger.warning("%s was in use by %s: waiting %s", self.subject, watch.holder or "another process", until)
        return watch.is_dead()


class Renewal(threading.Thread):
    """Renews a lease in its own thread; ends the process when the lease has been taken over."""

    def __init__(self, fence: Fence, renew_s: float) -> None:
        super().__init__(name="lease", daemon=True)
        self.fence, self.renew_s = fence, renew_s
        self.over = threading.Event()
        self.renewing = threading.Lock()

    def run(self) -> None:
        """Renew until the block ends."""
        count = 0
        while not self.over.wait(self.renew_s):
            count += 1
            with self.renewing:
                if not self.over.is_set():
                    self._renew(count)

    def _renew(self, count: int) -> None:
        try:
            other = lease_file.renew(self.fence.file, self.fence.line, count)
        except OSError:  # if that lasts, another may take the lease, and that is seen when the disk is back
            return
        if other is not None:
            self.fence.end(other)

    def end(self) -> bool:
        """Stop renewing; false if a renewal hangs on the disk and may still come."""
        self.over.set()
        return self.renewing.acquire(timeout=END_S)
