"""The page from a small read-only server, so that it follows a run that goes on."""

from __future__ import annotations

import hashlib
import socket
import time
from collections.abc import Sequence
from http import HTTPStatus
from pathlib import Path
from threading import Lock

from flm_megatron.errors import FlmError, RequestError
from flm_megatron.evaluation.report.page import framed, main_part, read_runs, title_of
from flm_megatron.http_server import HTML, PLAIN, ReadHandler, ReadServer
from flm_megatron.training.metrics.events import FILE
from flm_megatron.training.metrics.goodput import FILE as GOODPUT_FILE

WATCHED = (FILE, GOODPUT_FILE)
"""Files of a run's folder that grow while it trains."""
QUICK_S, MOST_SHARE = 0.5, 0.1
"""A page that takes longer to make is not made all the time: it would take a core from the run that it shows."""


class LivePage:
    """The page over the runs in `folders`, made anew when a file of theirs has changed; a slow one not all the time."""

    def __init__(self, folders: Sequence[Path], scratch: Sequence[Path] = (), laws: Path | None = None) -> None:
        self.folders, self.scratch, self.laws = folders, scratch, laws
        self.lock = Lock()
        self.seen: list[tuple[int, int]] = []
        self.title, self.main, self.version = "", "", ""
        self.keep_until = 0.0
        self.refresh()

    def whole(self) -> str:
        """The page as it is now."""
        main, _ = self.refresh()
        return framed(self.title, main, live=True)

    def refresh(self) -> tuple[str, str]:
        """The part that changes, and its version as an entity tag."""
        with self.lock:
            seen = [_stamp(folder / name) for folder in (*self.folders, *self.scratch) for name in WATCHED]
            began = time.monotonic()
            if not self.main or (seen != self.seen and began >= self.keep_until):
                histories, compared = read_runs(self.folders, self.scratch, self.laws)
                self.title, self.main = title_of(histories), main_part(histories, compared)
                self.version = f'"{hashlib.sha256(self.main.encode()).hexdigest()[:16]}"'
                self.seen = seen
                took_s = time.monotonic() - began
                self.keep_until = began + (took_s / MOST_SHARE if took_s > QUICK_S else 0.0)
            return self.main, self.version


def report_server(live: LivePage, address: str, port: int) -> ReadServer:
    """A server of the page at `/`, bound but not yet serving; `port` 0 takes a free one.

    Raises:
        RequestError: the address cannot be listened on.
    """

    class Handler(_Handler):
        """Answers for this page."""

        page = live
        names = frozenset({"localhost", address.lower(), socket.gethostname().lower()})

    try:
        return ReadServer(address, port, Handler)
    except (OSError, OverflowError) as error:
        raise RequestError(f"--serve cannot listen on {address}, port {port}: {error}") from None


class _Handler(ReadHandler):
    """Two paths; nothing of the request names a file."""

    page: LivePage

    def answer(self) -> None:
        """The page, or its part that changes."""
        if self.path not in ("/", "/main"):
            return self.send(HTTPStatus.NOT_FOUND, b"no such page\n", PLAIN)
        try:
            text, version = self.page.refresh() if self.path == "/main" else (self.page.whole(), "")
        except (FlmError, OSError) as error:
            return self.send(HTTPStatus.SERVICE_UNAVAILABLE, f"{error}\n".encode(), PLAIN)
        if version and self.headers.get("If-None-Match") == version:
            return self.send(HTTPStatus.NOT_MODIFIED, b"", HTML, {"ETag": version})
        return self.send(HTTPStatus.OK, text.encode(), HTML, {"ETag": version} if version else None)


def _stamp(path: Path) -> tuple[int, int]:
    """Size and time of change of a file; zeros where there is none."""
    try:
        found = path.stat()
    except OSError:
        return (0, 0)
    return (found.st_size, found.st_mtime_ns)
