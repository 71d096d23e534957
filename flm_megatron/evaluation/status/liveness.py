"""Whether a run's process is alive, by the lease that it renews in the output folder."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Literal

from flm_megatron.checkpoint.lease import file as lease_file
from flm_megatron.checkpoint.lease.watch import Watch

LOOK_S = 0.5
Alive = Literal["yes", "no", "killed", "unknown"]


class Liveness:
    """Looks at the lease of the run in `folder`.

    `yes`: it runs, or renewed its lease while this object watched. `no`: there is no lease, so the run has ended or
    has not begun. `killed`: a lease is left whose process is gone. `unknown`: it is of another host, and not yet
    watched for long enough.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / lease_file.LEASE
        self._watch = Watch()

    def look(self) -> Alive:
        """What is known now."""
        content = lease_file.read(self.file)
        if content is None:
            self._watch = Watch()
            return "no"
        self._watch.look(content)
        if self._watch.alive():
            return "yes"
        return "killed" if self._watch.is_dead() else "unknown"

    def settle(self) -> Alive:
        """`look`, waiting where that is not known yet: up to the time after which a silent lease is dead."""
        found = self.look()
        deadline = time.monotonic() + self._watch.silence_s + LOOK_S
        while found == "unknown" and time.monotonic() < deadline:
            time.sleep(LOOK_S)
            found = self.look()
        return found

    @property
    def holder(self) -> str:
        """The process that holds the lease, as text; empty if there is none or it does not say."""
        return str(self._watch.holder) if self._watch.holder else ""
