"""The file of a lease and the steps on it, each safe among any number of processes on a shared file system.

The first line says who holds the lease, the second counts its renewals. The file appears by an exclusive creation and
is renewed in place, so that a holder whose file was replaced can never write into its successor's. Who wants to end a
lease, its holder or one who takes it over, first creates its *claim*, a file named after the lease's first line, and
only one can. A taker then looks once more, and renames the claim, which holds its own first line, to the lease. A claim
whose maker was killed is ended in the same way, by a claim on it.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
from contextlib import suppress
from pathlib import Path

LEASE = ".lease"
"""Name of a run's lease in its output folder."""
LONGEST = 2**16
COUNT_DIGITS = 12
CLAIM_BYTES = 8


def create(file: Path, holder: bytes) -> bool:
    """Make the file with the first line `holder` (with its end of line); false if it is there already."""
    try:
        descriptor = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except FileExistsError:
        return False
    try:
        os.write(descriptor, holder + _count(0))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return True


def read(file: Path) -> bytes | None:
    """The content of the file; none if it does not exist. Opened anew each time: NFS asks the server on open."""
    try:
        descriptor = os.open(file, os.O_RDONLY)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESTALE):
            return None
        raise
    try:
        return os.read(descriptor, LONGEST)
    finally:
        os.close(descriptor)


def holder_line(content: bytes) -> bytes:
    """The first line, with its end: who holds the lease."""
    return content.partition(b"\n")[0] + b"\n"


def holds(file: Path, holder: bytes) -> bool:
    """Whether the file has this first line."""
    content = read(file)
    return content is not None and holder_line(content) == holder


def claim_of(file: Path, holder: bytes) -> Path:
    """The claim on the lease with this first line."""
    return file.with_name(f"{file.name}.{hashlib.blake2b(holder, digest_size=CLAIM_BYTES).hexdigest()}")


def renew(file: Path, holder: bytes, count: int) -> bytes | None:
    """Write the count of renewals; if the first line is another's, returns that and writes nothing.

    A file that is gone, because somebody removed it, is made again. Raises OSError if the file system fails.
    """
    try:
        descriptor = os.open(file, os.O_RDWR)
    except FileNotFoundError:
        return None if create(file, holder) else renew(file, holder, count)
    try:
        found = holder_line(os.read(descriptor, LONGEST))
        if found != holder:
            return found
        os.pwrite(descriptor, _count(count), len(holder))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return None


def take_over(file: Path, judged: bytes, holder: bytes) -> bool:
    """Replace a lease that was judged dead with the content `judged` by one with the first line `holder`.

    The caller has made the claim on it. Returns whether the lease is now `holder`'s; the claim is gone.
    """
    claim = claim_of(file, holder_line(judged))
    try:
        if read(file) == judged:
            # Not found: another took a claim that it thought was dead. Who holds the lease is looked at below.
            with suppress(FileNotFoundError):
                claim.rename(file)
    finally:
        if holds(claim, holder):
            claim.unlink(missing_ok=True)
    return holds(file, holder)


def remove_claim(claim: Path, judged: bytes) -> None:
    """Remove a claim that was judged dead with the content `judged`; the caller has made the claim on it."""
    try:
        if read(claim) == judged:
            claim.unlink()
    finally:
        claim_of(claim, holder_line(judged)).unlink(missing_ok=True)


def sweep(file: Path, holder: bytes) -> None:
    """Remove claims on earlier leases, left by processes that were killed; `holder` holds the lease."""
    claims = re.compile(re.escape(file.name) + rf"(\.[0-9a-f]{{{2 * CLAIM_BYTES}}})+")
    own = claim_of(file, holder).name
    for entry in file.parent.iterdir():
        if claims.fullmatch(entry.name) and not entry.name.startswith(own):
            entry.unlink(missing_ok=True)


def give_up(file: Path, holder: bytes) -> None:
    """Remove the file if it has the first line `holder` and nobody is taking it over."""
    claim = claim_of(file, holder)
    if not create(claim, holder):
        return
    try:
        if holds(file, holder):
            file.unlink()
    finally:
        claim.unlink(missing_ok=True)


def _count(count: int) -> bytes:
    """The second line, of constant length."""
    return f"{count:0{COUNT_DIGITS}d}\n".encode()
