"""Whether the holder of a lease is alive, as far as another process has seen. No torch here: `flm status` looks too."""

from __future__ import annotations

import time

from flm_megatron.checkpoint.lease import file as lease_file
from flm_megatron.checkpoint.lease.holder import Holder

RENEW_S = 5.0
SILENT_RENEWALS = 6


class Watch:
    """What one process has seen of another's lease."""

    def __init__(self) -> None:
        self.holder: Holder | None = None
        self.silence_s = 0.0
        self._line: bytes | None = None
        self._content: bytes | None = None  # an empty file is one that its maker has not written yet
        self._since = 0.0
        self._renewed = False
        self._ended: bool | None = None

    def look(self, content: bytes) -> bool:
        """Note the file's content; returns whether it is another lease than last time."""
        now, line = time.monotonic(), lease_file.holder_line(content)
        known = line == self._line
        self._renewed = known and (self._renewed or content != self._content)
        if not known:
            self.holder = Holder.from_bytes(line)
            self.silence_s = SILENT_RENEWALS * (self.holder.renew_s if self.holder else RENEW_S)
        if content != self._content:
            self._line, self._content, self._since = line, content, now
        self._ended = self.holder.has_ended() if self.holder else None
        return not known

    def alive(self) -> str:
        """The sign of life that was seen, as text; empty if none was."""
        if self._ended is False:
            return "is running"
        return "has renewed its lease while it was watched" if self._renewed and not self.is_dead() else ""

    def is_dead(self) -> bool:
        """Whether the process is gone or was silent for too long."""
        return self._ended or (self._ended is None and time.monotonic() - self._since >= self.silence_s)
