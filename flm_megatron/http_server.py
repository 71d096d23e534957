"""A small server of pages that are only read: few clients at a time, none for long, so that whoever runs it goes on."""

from __future__ import annotations

import ipaddress
import socket
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock
from typing import Any

MOST_CLIENTS = 32
"""Clients at a time; those beyond are turned away at once, for each is a thread and an open file."""
PATIENCE_S = 10.0
"""Seconds in which a client must have asked, and then again must have taken its answer."""
HTML, PLAIN = "text/html; charset=utf-8", "text/plain; charset=utf-8"
Request = socket.socket | tuple[bytes, socket.socket]


class ReadServer(ThreadingHTTPServer):
    """Listens at an address of either family, and a port (0: a free one). Raises OSError, OverflowError if it fails."""

    daemon_threads = True
    request_queue_size = MOST_CLIENTS

    def __init__(self, address: str, port: int, handler: type[ReadHandler]) -> None:
        self._lock, self._clients, self._asking = Lock(), set[Request](), dict[Request, float]()
        self.address_family, *_, place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        super().__init__((str(place[0]), port), handler)

    def server_bind(self) -> None:
        """Bind, without the question to DNS by which the standard library finds a name that nobody uses."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def verify_request(self, request: Request, client_address: object) -> bool:
        """Whether there is room for one more client, which has its time from now on."""
        with self._lock:
            if len(self._clients) >= MOST_CLIENTS:
                return False
            self._clients.add(request)
            self._asking[request] = time.monotonic() + PATIENCE_S
            return True

    def has_asked(self, request: Request) -> None:
        """The client has said what it wants."""
        with self._lock:
            self._asking.pop(request, None)

    def shutdown_request(self, request: Request) -> None:
        """The client goes."""
        with self._lock:
            self._clients.discard(request)
            self._asking.pop(request, None)
            super().shutdown_request(request)

    def service_actions(self) -> None:
        """Between two looks at the port: end clients that have been asking for too long, a byte now and then."""
        now = time.monotonic()
        with self._lock:
            for client in [client for client, end in self._asking.items() if end < now]:
                del self._asking[client]
                assert isinstance(client, socket.socket), "TCP"
                with suppress(OSError):  # it has gone by itself
                    client.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Request, client_address: object) -> None:
        """Clients that go away are nothing to talk about."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class ReadHandler(BaseHTTPRequestHandler):
    """Answers GET and HEAD; a request names nothing but one of a few pages."""

    server: ReadServer
    timeout = PATIENCE_S
    names: frozenset[str] | None = None
    """Host names that it answers to beside addresses, in lower case; all if none are given."""
    server_version, sys_version = "flm", ""

    def answer(self) -> None:
        """Send the page of `self.path`."""
        raise NotImplementedError

    def do_GET(self) -> None:
        """Answer, if the request is for this host."""
        self.server.has_asked(self.request)
        if self.names is not None and not _known_host(self.headers.get("Host", ""), self.names):
            self.send(HTTPStatus.FORBIDDEN, b"this host name is not the server's\n", PLAIN)
        else:
            self.answer()

    do_HEAD = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing of requests."""

    def send(self, status: HTTPStatus, body: bytes, kind: str, more: Mapping[str, str] | None = None) -> None:
        """Send an answer whole, with `more` headers."""
        self.send_response(status)
        headers = {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
        }
        for name, value in {**headers, **(more or {})}.items():
            self.send_header(name, value)
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
