"""One run for a URL: an object that its holder makes, only if it is not there, and renews while it lasts."""

from __future__ import annotations

import json
import os
import socket
import time
import uuid

import psutil

from flm_megatron.errors import RequestError
from flm_megatron.json_text import parse_json
from flm_megatron.storage import store
from flm_megatron.url import join, shown

LEASE = ".lease"
RENEW_S, SILENT_S, LOOK_S = 10.0, 60.0, 1.0


class UrlLease:
    """The lease of the folder at `url`."""

    def __init__(self, url: str) -> None:
        self.url, self.where = url, join(url, LEASE)
        started = psutil.Process().create_time()
        self._own = {"host": socket.gethostname(), "pid": os.getpid(), "started": started, "id": uuid.uuid4().hex}
        self._renewed = 0

    def take(self) -> None:
        """Take it; one whose holder is silent for SILENT_S seconds, or is gone from this machine, is taken over.

        Raises:
            RequestError: another run holds it and is alive, or the store fails.
        """
        while not store.create(self.where, self._content()):
            found = self._found()
            if found is None:
                continue
            self._wait_until_dead(found)
            if self._found() == found:
                store.remove(self.where)

    def renew(self) -> bool:
        """Renew it; false if another run has taken it over. Raises RequestError if the store fails."""
        if not self.is_ours():
            return False
        self._renewed += 1
        store.write(self.where, self._content())
        return True

    def is_ours(self) -> bool:
        """Whether it is still this run's. Raises RequestError if the store fails."""
        found = self._found()
        return found is not None and _parsed(found).get("id") == self._own["id"]

    def give_up(self) -> None:
        """Remove it, if it is still this run's. Raises RequestError if the store fails."""
        if self.is_ours():
            store.remove(self.where)

    def _content(self) -> bytes:
        return json.dumps({**self._own, "renewed": self._renewed}).encode()

    def _found(self) -> bytes | None:
        try:
            return store.read(self.where)
        except FileNotFoundError:
            return None

    def _wait_until_dead(self, found: bytes) -> None:
        holder = _parsed(found)
        who = f"process {holder.get('pid')} on {holder.get('host')}"
        if holder.get("host") == self._own["host"]:
            if not _is_running(holder):
                return
            raise _in_use(self.url, f"{who}, which is running")
        began = time.monotonic()
        while time.monotonic() - began < SILENT_S:
            time.sleep(LOOK_S)
            if self._found() != found:
                raise _in_use(self.url, f"{who}, which has renewed its lease")


def _is_running(holder: dict[str, object]) -> bool:
    """Whether the holder's process, and none that has its number since, runs on this machine."""
    try:
        return psutil.Process(int(str(holder.get("pid")))).create_time() == holder.get("started")
    except (psutil.Error, ValueError):
        return False


def _parsed(content: bytes) -> dict[str, object]:
    try:
        values = parse_json(content, LEASE)
    except RequestError:
        return {}
    return values if isinstance(values, dict) else {}


def _in_use(url: str, who: str) -> RequestError:
    return RequestError(
        f"output {shown(url)} is in use by {who}: wait until it has ended or stop it, or choose another `output`"
    )
