"""What the files of a run have gained since they were last read: the one place where a run folder is opened."""

from __future__ import annotations

import os
from pathlib import Path

from flm_megatron.errors import DamagedError


class Follower:
    """Whole lines of a file that grows; it may be missing still, and may be replaced by a shorter one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._at = 0
        self._inode = -1

    def gained(self) -> tuple[bool, list[str]]:
        """Whether to forget what was read before, for the file was replaced, and the lines after that.

        A last line without its end is left until it has one.

        Raises:
            DamagedError: the file is there and cannot be read.
        """
        try:
            with self.path.open("rb") as file:
                anew = self._replaced(os.fstat(file.fileno()))
                file.seek(self._at)
                data = file.read()
        except FileNotFoundError:
            anew, self._at, self._inode = self._at > 0, 0, -1
            return anew, []
        except OSError as error:
            raise DamagedError(f"{self.path} cannot be read: {error.strerror or error}") from None
        whole = data[: data.rfind(b"\n") + 1]
        self._at += len(whole)
        return anew, whole.decode("utf-8", "replace").splitlines()

    def _replaced(self, now: os.stat_result) -> bool:
        """Whether this is another file than the one read so far, or has been cut; it is read from the start then."""
        anew = self._at > 0 and (now.st_ino != self._inode or now.st_size < self._at)
        self._inode = now.st_ino
        if anew:
            self._at = 0
        return anew
