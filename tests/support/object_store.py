"""A real S3 server on loopback (moto's), in front of which faults can be put.

The fixture `object_store` (tests/conftest.py) starts one server per session and gives each test a bucket of its own,
without faults, with the environment that boto, s3fs and fsspec read; processes that a test starts inherit it:

    def test_a_retry(object_store: ObjectStore) -> None:
        object_store.put("corpus.bin", b"...")
        fault = object_store.fail(method="GET", key="corpus.bin", times=2)       # 503, 503, then the object
        ...
        assert fault.met == 2

A fault meets the requests that agree with its method and whose key its regular expression finds; the first `after` of
them pass, the next `times` are met. The server sees `object_store.requests`, for tests that count them.
"""

from __future__ import annotations

import copy
import io
import re
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl

ACCESS_KEY, SECRET_KEY = "loopback-access", "loopback-secret-canary-1f9e"
"""Made-up credentials: no log, file or message of the program may ever hold the second."""
LONGEST_HANG_S = 60.0

Environ = dict[str, Any]  # as WSGI has it
StartResponse = Callable[..., Any]
Application = Callable[[Environ, StartResponse], Iterable[bytes]]


@dataclass(frozen=True)
class Request:
    """A request as the server saw it. `operation` tells apart what has the same method."""

    method: str
    bucket: str
    key: str
    query: Mapping[str, str]

    @property
    def operation(self) -> str:
        """`list`, `part` (of a multipart upload), `begin`, `complete`, `abort`, or the method in small letters."""
        if self.method == "GET" and not self.key:
            return "list"
        if "uploadId" in self.query:
            return {"PUT": "part", "POST": "complete", "DELETE": "abort"}.get(self.method, self.method.lower())
        return "begin" if "uploads" in self.query else self.method.lower()


@dataclass
class Fault:
    """What happens to the requests that it meets, in this order: wait, then one of the others, else the true answer.

    `met` counts them.
    """

    method: str
    """As HTTP has it, or an `operation` of `Request`; any if empty."""
    key: str
    """A regular expression that is searched in the key (for lists, in the prefix)."""
    after: int = 0
    times: int | None = 1
    """How many requests are met; all if None."""
    delay_s: float = 0.0
    status: int | None = None
    """The answer, without the request being carried out."""
    truncate: int | None = None
    """The answer says its full length, and ends after so many bytes of its body."""
    drop: str = ""
    """`before` or `after` the request is carried out the connection is closed without an answer."""
    hang: bool = False
    """No answer until the test has ended."""
    seen: int = 0
    met: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def meets(self, request: Request) -> bool:
        """Whether this request is one of those; counts it."""
        searched = request.query.get("prefix", "") if request.operation == "list" else request.key
        named = self.method in ("", request.method, request.operation)
        with self.lock:
            if not named or not re.search(self.key, searched):
                return False
            self.seen += 1
            if self.seen <= self.after or (self.times is not None and self.met >= self.times):
                return False
            self.met += 1
            return True


class FaultyApplication:
    """WSGI middleware that puts faults before moto's S3."""

    def __init__(self, inner: Application) -> None:
        self.inner = inner
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.released = threading.Event()
        self.listed: dict[str, Any] | None = None
        self._turn = threading.Lock()

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        """Answer a request."""
        request = _request(environ)
        self.requests.append(request)
        fault = next((fault for fault in self.faults if fault.meets(request)), None)
        if fault is None:
            return self._answer(request, environ, start_response)
        _read_body(environ)
        time.sleep(fault.delay_s)
        if fault.hang:
            self.released.wait(LONGEST_HANG_S)
        if fault.hang or fault.drop == "before":
            return _closed(environ)
        if fault.status is not None:
            return _refusal(fault.status, start_response)
        answer = self._answer(request, environ, start_response)
        if fault.drop == "after":
            return _closed(environ)
        return answer if fault.truncate is None else _cut(environ, answer, fault.truncate)

    def _answer(self, request: Request, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        if self.listed is None:
            return self.inner(environ, start_response)
        with self._turn:  # while lists are stale, one request at a time, as they are answered out of another state
            buckets = _buckets()
            if request.operation != "list" or request.bucket not in self.listed:
                return list(self.inner(environ, start_response))
            present, buckets[request.bucket].keys = buckets[request.bucket].keys, self.listed[request.bucket]
            try:
                return list(self.inner(environ, start_response))
            finally:
                buckets[request.bucket].keys = present


def _request(environ: Environ) -> Request:
    bucket, _, key = environ["PATH_INFO"].lstrip("/").partition("/")
    query = dict(parse_qsl(environ.get("QUERY_STRING", ""), keep_blank_values=True))
    return Request(environ["REQUEST_METHOD"], bucket, key, query)


def _backend() -> Any:
    from moto.core import DEFAULT_ACCOUNT_ID
    from moto.s3.models import s3_backends

    return s3_backends[DEFAULT_ACCOUNT_ID]["aws"]


def _buckets() -> dict[str, Any]:
    buckets: dict[str, Any] = _backend().buckets
    return buckets


def _read_body(environ: Environ) -> None:
    """Read what the client sends, as a real server does before it answers; the application reads it again."""
    if environ.get("wsgi.input_terminated"):
        environ["wsgi.input"] = io.BytesIO(environ["wsgi.input"].read())
        return
    length = int(environ.get("CONTENT_LENGTH") or 0)
    environ["wsgi.input"] = io.BytesIO(environ["wsgi.input"].read(length))


def _closed(environ: Environ) -> Iterable[bytes]:
    with suppress(OSError):
        environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
    raise ConnectionAbortedError  # the server looks for nothing more on this connection


def _refusal(status: int, start_response: StartResponse) -> Iterable[bytes]:
    code = {403: "AccessDenied", 404: "NoSuchKey", 500: "InternalError", 503: "SlowDown"}.get(status, "Made up")
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>put in by a test</Message></Error>".encode()
    headers = [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))]
    start_response(f"{status} {code}", headers)
    return [body]


def _cut(environ: Environ, answer: Iterable[bytes], length: int) -> Iterator[bytes]:
    yield b"".join(answer)[:length]
    yield from _closed(environ)


class ObjectStore:
    """The server, and a bucket of the test that uses it."""

    def __init__(self) -> None:
        """Start on a free port of 127.0.0.1."""
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import WSGIRequestHandler, make_server

        class Quiet(WSGIRequestHandler):
            protocol_version = "HTTP/1.1"

            def log(self, *_: Any) -> None:
                """Say nothing: faults are meant, and `requests` has the rest."""

        self._application = FaultyApplication(DomainDispatcherApplication(create_backend_app))
        self._server = make_server("127.0.0.1", 0, self._application, threaded=True, request_handler=Quiet)
        self._thread = threading.Thread(target=self._server.serve_forever, name="object-store", daemon=True)
        self._thread.start()
        self.endpoint = f"http://127.0.0.1:{self._server.port}"
        self.bucket, self._count = "", 0

    @property
    def environment(self) -> dict[str, str]:
        """What a program has in its environment to use this store and no other."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def begin(self) -> None:
        """Make a new bucket and take all faults away."""
        self.end()
        self._application.released = threading.Event()
        self._count += 1
        self.bucket = f"test-{self._count}"
        _backend().create_bucket(self.bucket, "us-east-1")
        self.requests.clear()

    def end(self) -> None:
        """Take all faults away and let go what hangs."""
        self._application.faults.clear()
        self._application.listed = None
        self._application.released.set()

    def stop(self) -> None:
        """End the server."""
        self.end()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def requests(self) -> list[Request]:
        """What was asked since `begin`, in order."""
        return self._application.requests

    def count(self, operation: str, key: str = "") -> int:
        """Requests of an operation (see `Request`) whose key the regular expression `key` finds."""
        return sum(one.operation == operation and re.search(key, one.key) is not None for one in list(self.requests))

    def url(self, key: str = "") -> str:
        """s3://BUCKET/KEY."""
        return f"s3://{self.bucket}/{key}".rstrip("/")

    def client(self) -> Any:
        """A client of boto3, which is an oracle for what lies in the store."""
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            region_name="us-east-1",
        )

    def put(self, key: str, data: bytes) -> None:
        """Write an object, past all faults and not among `requests`."""
        _backend().put_object(self.bucket, key, data)

    def get(self, key: str) -> bytes:
        """The bytes of an object, past all faults and not among `requests`. Raises KeyError if it is not there."""
        data: bytes = _buckets()[self.bucket].keys[key].value
        return data

    def all_keys(self, prefix: str = "") -> list[str]:
        """Keys of the bucket as they are, sorted."""
        return sorted(key for key in _buckets()[self.bucket].keys if key.startswith(prefix))

    def open_uploads(self) -> list[str]:
        """Keys of multipart uploads that were begun, and neither completed nor aborted."""
        return [upload.key_name for upload in _buckets()[self.bucket].multiparts.values()]

    def fail(
        self, method: str = "", key: str = "", *, status: int = 503, after: int = 0, times: int | None = 1
    ) -> Fault:
        """Answer with an error of the server instead."""
        return self.add(Fault(method, key, after, times, status=status))

    def slow(self, method: str = "", key: str = "", *, delay_s: float, times: int | None = None) -> Fault:
        """Answer only after `delay_s` seconds."""
        return self.add(Fault(method, key, times=times, delay_s=delay_s))

    def truncate(self, key: str, length: int, *, after: int = 0, times: int | None = 1) -> Fault:
        """Close the connection after `length` bytes of the body that GET was promised."""
        return self.add(Fault("get", key, after, times, truncate=length))

    def drop(self, method: str = "", key: str = "", *, when: str = "before", times: int | None = 1) -> Fault:
        """Close the connection without an answer, `before` or `after` the request is carried out."""
        return self.add(Fault(method, key, times=times, drop=when))

    def hang(self, method: str = "", key: str = "", *, times: int | None = None) -> Fault:
        """Never answer."""
        return self.add(Fault(method, key, times=times, hang=True))

    def add(self, fault: Fault) -> Fault:
        """Put a fault in; of several that meet a request the first counts."""
        self._application.faults.append(fault)
        return fault

    def stale_lists(self) -> None:
        """From now on lists show the keys of this moment, whatever is written or deleted; objects are as they are."""
        for bucket in _buckets().values():
            for key in bucket.keys.values():
                _ = key.etag  # of its bytes, which moto lets go when it is deleted
        self._application.listed = {name: copy.copy(bucket.keys) for name, bucket in _buckets().items()}

    def fresh_lists(self) -> None:
        """Lists are true again."""
        self._application.listed = None
