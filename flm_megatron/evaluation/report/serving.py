"""The page from a small read-only server, so that it follows a run that goes on."""

from __future__ import annotations

import hashlib
import ipaddress
import socket
from collections.abc import Callable, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock

from flm_megatron.errors import FlmError, RequestError
from flm_megatron.evaluation.report.page import main_part, page, read_runs
from flm_megatron.training.metrics.events import FILE
from flm_megatron.training.metrics.goodput import FILE as GOODPUT_FILE

WATCHED = (FILE, GOODPUT_FILE)
"""Files of a run's folder that grow while it trains."""
HTML = "text/html; charset=utf-8"
PLAIN = "text/plain; charset=utf-8"


class LivePage:
    """The page over the runs in `folders`, made anew only when a file of theirs has changed."""

    def __init__(self, folders: Sequence[Path], scratch: Sequence[Path] = (), laws: Path | None = None) -> None:
        self.folders, self.scratch, self.laws = folders, scratch, laws
        self.lock = Lock()
        self.seen: list[tuple[int, int]] = []
        self.main, self.version = "", ""
        self.refresh()

    def whole(self) -> str:
        """The page as it is now."""
        return page(*read_runs(self.folders, self.scratch, self.laws), live=True)

    def refresh(self) -> tuple[str, str]:
        """The part that changes, and its version as an entity tag."""
        with self.lock:
            seen = [_stamp(folder / name) for folder in (*self.folders, *self.scratch) for name in WATCHED]
            if seen != self.seen or not self.main:
                self.main = main_part(*read_runs(self.folders, self.scratch, self.laws))
                self.version = f'"{hashlib.sha256(self.main.encode()).hexdigest()[:16]}"'
                self.seen = seen
            return self.main, self.version


def report_server(live: LivePage, address: str, port: int) -> ThreadingHTTPServer:
    """A server of the page at `/`, bound but not yet serving; `port` 0 takes a free one.

    Raises:
        RequestError: the address cannot be listened on.
    """

    class Handler(_Handler):
        """Answers for this page."""

        page = live
        names = frozenset({"localhost", address.lower(), socket.gethostname().lower()})

    class Server(ThreadingHTTPServer):
        """Of the family of its address."""

        daemon_threads = True
        address_family = socket.AF_INET6 if ":" in address else socket.AF_INET

    try:
        return Server((address, port), Handler)
    except (OSError, OverflowError) as error:
        raise RequestError(f"--serve cannot listen on {address}, port {port}: {error}") from None


class _Handler(BaseHTTPRequestHandler):
    """Two paths, GET and HEAD; nothing of the request names a file."""

    page: LivePage
    names: frozenset[str]
    server_version, sys_version = "flm-report", ""

    def do_GET(self) -> None:
        """The page, or its part that changes."""
        answers: dict[str, Callable[[], None]] = {"/": self._whole, "/main": self._main}
        if not _known_host(self.headers.get("Host", ""), self.names):
            return self._send(HTTPStatus.FORBIDDEN, "this host name is not the report's\n", PLAIN)
        answer = answers.get(self.path)
        if answer is None:
            return self._send(HTTPStatus.NOT_FOUND, "no such page\n", PLAIN)
        try:
            answer()
        except (FlmError, OSError) as error:
            self._send(HTTPStatus.SERVICE_UNAVAILABLE, f"{error}\n", PLAIN)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing of requests."""

    def _whole(self) -> None:
        self._send(HTTPStatus.OK, self.page.whole(), HTML)

    def _main(self) -> None:
        text, version = self.page.refresh()
        if self.headers.get("If-None-Match") == version:
            self._send(HTTPStatus.NOT_MODIFIED, "", HTML, version)
        else:
            self._send(HTTPStatus.OK, text, HTML, version)

    def _send(self, status: HTTPStatus, text: str, kind: str, version: str = "") -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        if version:
            self.send_header("ETag", version)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _known_host(header: str, names: frozenset[str]) -> bool:
    """Whether a Host header is an address, or in `names`: another site's name may have been made to lead here."""
    host = header.rpartition(":")[0] if header.rpartition(":")[2].isdigit() else header
    host = host.lower().removeprefix("[").removesuffix("]")
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return host in names
    return True


def _stamp(path: Path) -> tuple[int, int]:
    """Size and time of change of a file; zeros where there is none."""
    try:
        found = path.stat()
    except OSError:
        return (0, 0)
    return (found.st_size, found.st_mtime_ns)
