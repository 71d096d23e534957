"""Sends what changed in an output folder to a store, in a thread that training never waits for."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from flm_megatron.checkpoint.files.manifest import MANIFEST
from flm_megatron.errors import RequestError
from flm_megatron.launch.mirror.files import LocalFile, checkpoint_of, checkpoints_of, in_order, local_files
from flm_megatron.launch.mirror.lease import RENEW_S, UrlLease
from flm_megatron.storage import store
from flm_megatron.storage.retry import SLOWEST_BYTES_PER_S
from flm_megatron.storage.store import ObjectInfo
from flm_megatron.url import join, shown

END_S = 60.0
"""Seconds that the end of a run waits for the store, and what the bytes take at its slowest."""
GROWING_BYTES_PER_S = 2**20
"""A file that grows is sent so rarely that it costs no more than this on average: an object has to be sent whole."""


class Uploads(threading.Thread):
    """Keeps `url` as the folder is, from `start()` to `finish()`."""

    def __init__(
        self, folder: Path, url: str, lease: UrlLease, there: dict[str, ObjectInfo], interval_s: float
    ) -> None:
        """`there` is what the store had when the run began."""
        super().__init__(name="mirror", daemon=True)
        self.folder, self.url, self.lease, self.interval_s = folder, url, lease, interval_s
        local = local_files(folder)
        checkpoints = checkpoints_of(local)
        self._sent = {
            name: file
            for name, file in local.items()
            if checkpoint_of(name, checkpoints) and name in there and there[name].size == file.size
        }
        self._at: dict[str, float] = {}
        self._known = checkpoints
        self._ending = threading.Event()
        self._done = threading.Event()
        self._warned = False
        self._lost = False

    def run(self) -> None:
        """Send at intervals, and once more at the end."""
        last = -self.interval_s
        while not self._ending.wait(min(RENEW_S, self.interval_s)):
            self._attempt(self._renew)
            if not self._lost and time.monotonic() - last >= self.interval_s:
                last = time.monotonic()
                self._attempt(lambda: self.send(everything=False))
        if not self._lost and self._attempt(lambda: self.send(everything=True)):
            self._attempt(self.lease.give_up)
            self._done.set()

    def finish(self) -> None:
        """Send what is left, for a bounded time; what could not be sent is said in one line, and stays here."""
        files = local_files(self.folder).values()
        left = sum(file.size for file in files if self._sent.get(file.name) != file)
        self._ending.set()
        self.join(END_S + left / SLOWEST_BYTES_PER_S)
        if not self._done.is_set():
            _warn(
                f"{shown(self.url)} does not have all of this run: it lies in {self.folder}, and the same command on "
                "this machine sends it"
            )

    def send(self, everything: bool) -> None:
        """Send what changed, metrics before checkpoints; remove checkpoints that are no longer kept here.

        Raises RequestError when the store fails; the next call goes on.
        """
        files = local_files(self.folder)
        checkpoints = checkpoints_of(files)
        for name in in_order(files, checkpoints):
            if self._sent.get(name) != files[name] and (everything or self._is_due(files[name])):
                self._send(files[name])
        for path in self._known - checkpoints:
            self._remove(path)
        self._known = checkpoints

    def _is_due(self, file: LocalFile) -> bool:
        return time.monotonic() - self._at.get(file.name, -1e9) >= file.size / GROWING_BYTES_PER_S

    def _send(self, file: LocalFile) -> None:
        """Send a file; the manifest of a checkpoint only if all of it is still here and there."""
        try:
            store.upload(self.folder / file.name, join(self.url, file.name))
        except FileNotFoundError:  # pruned meanwhile: the checkpoint's manifest is gone here too
            return
        self._sent[file.name], self._at[file.name] = file, time.monotonic()

    def _remove(self, path: str) -> None:
        """Remove a checkpoint: first its manifest, without which it is none."""
        store.remove(join(self.url, path, MANIFEST))
        for found in store.below(join(self.url, path)):
            store.remove(found.url)
        self._sent = {name: file for name, file in self._sent.items() if not name.startswith(f"{path}/")}

    def _renew(self) -> None:
        if not self.lease.renew():
            self._lost = True
            _warn(f"{shown(self.url)} was taken over by another run: nothing more of this one is sent there")

    def _attempt(self, action: Callable[[], object]) -> bool:
        """Do it; a failing store is said once until it works again."""
        try:
            action()
        except (RequestError, OSError) as error:
            if not self._warned:
                _warn(f"{error}; training goes on, and it is sent later")
            self._warned = True
            return False
        self._warned = False
        return True


def _warn(text: str) -> None:
    print(f"WARNING: {text}", file=sys.stderr, flush=True)
