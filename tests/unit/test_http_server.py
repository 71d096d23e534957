"""The server of what is read: clients that are slow, many, gone or sent here by another site take nothing from us."""

from __future__ import annotations

import http.client
import socket
import threading
import time
from collections.abc import Iterator
from http import HTTPStatus

import pytest

from flm_megatron import http_server
from flm_megatron.http_server import PLAIN, ReadHandler, ReadServer

BODY = b"x" * 2**24


class Handler(ReadHandler):
    """Answers with more than a socket holds."""

    names = frozenset({"localhost"})

    def answer(self) -> None:
        """The same, whatever is asked for."""
        self.send(HTTPStatus.OK, BODY, PLAIN)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ReadServer]:
    """A server of few and hasty clients."""
    monkeypatch.setattr(http_server, "MOST_CLIENTS", 3)
    monkeypatch.setattr(http_server, "PATIENCE_S", 1.0)
    monkeypatch.setattr(Handler, "timeout", 1.0)
    with ReadServer("127.0.0.1", 0, Handler) as found:
        thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield found
        found.shutdown()
        thread.join()


def connected(server: ReadServer, asked: bytes = b"") -> socket.socket:
    """A client that has sent this much."""
    client = socket.create_connection(("127.0.0.1", server.server_port), timeout=10)
    client.sendall(asked)
    return client


def answered(server: ReadServer) -> bool:
    """Whether a request is answered whole."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    try:
        connection.request("GET", "/")
        return connection.getresponse().read() == BODY
    except OSError:
        return False
    finally:
        connection.close()


def until(server: ReadServer) -> float:
    """Seconds until a request is answered."""
    began = time.monotonic()
    while not answered(server):
        assert time.monotonic() - began < 8
        time.sleep(0.05)
    return time.monotonic() - began


def test_clients_beyond_the_bound_are_turned_away_until_the_slow_ones_are_ended(server: ReadServer) -> None:
    before = threading.active_count()
    slow = [connected(server, b"GET / HT") for _ in range(3)]
    time.sleep(0.2)
    turned_away = [connected(server) for _ in range(20)]
    assert [client.recv(1) for client in turned_away] == [b""] * 20
    assert threading.active_count() <= before + 3
    until(server)
    for client in (*slow, *turned_away):
        client.close()


def test_a_byte_now_and_then_keeps_no_client(server: ReadServer) -> None:
    dripping = connected(server, b"GET / HTTP/1.1\r\nX: ")
    began = time.monotonic()
    with pytest.raises(OSError), dripping:
        while time.monotonic() - began < 8:
            dripping.sendall(b"a")
            time.sleep(0.1)
    assert time.monotonic() - began < 4


def test_who_does_not_take_the_answer_or_goes_away_is_let_go_in_silence(
    server: ReadServer, capfd: pytest.CaptureFixture[str]
) -> None:
    asked = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
    deaf = [connected(server, asked) for _ in range(2)]
    connected(server, asked).close()
    time.sleep(0.2)
    deaf.append(connected(server, asked))
    until(server)
    for client in deaf:
        client.close()
    assert capfd.readouterr().err == ""


def test_a_name_made_to_lead_here_is_refused(server: ReadServer) -> None:
    for host, status in ((b"localhost:1", b"200"), (b"127.0.0.1", b"200"), (b"evil.example", b"403"), (b"", b"403")):
        with connected(server, b"HEAD / HTTP/1.0\r\nHost: " + host + b"\r\n\r\n") as client:
            assert client.recv(64).split()[1] == status
