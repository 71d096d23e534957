"""Objects that are sent while they are written, in parts, by several threads; none is there until it is whole."""

from __future__ import annotations

import tempfile
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Protocol

from flm_megatron.errors import RequestError
from flm_megatron.storage import store
from flm_megatron.storage.retry import retrying

PART = 16 * 2**20
"""Bytes of a part; a store takes up to 10,000 of an object."""
AT_ONCE = 4
"""Parts that are sent at a time; as many again wait in memory at most."""


class Writer(Protocol):
    """A file that threads fill at any position; there, as a whole, at the end of a `with` without an error."""

    def __enter__(self) -> Writer: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    def write(self, data: memoryview, position: int) -> None:
        """Write bytes from `position` on; every byte once."""
        ...


def object_writer(url: str) -> Writer:
    """By a multipart upload where the store is S3; elsewhere through a temporary file of this machine."""
    return _Multipart(url) if store.is_s3(url) else _Spooled(url)


class _Multipart:
    """A part is sent when all of its bytes are written; the upload is aborted after an error."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._parts: dict[int, tuple[bytearray, int]] = {}
        self._tags: dict[int, str] = {}
        self._lock, self._slots = threading.Lock(), threading.Semaphore(2 * AT_ONCE)
        self._sending: list[Future[None]] = []

    def __enter__(self) -> _Multipart:
        self._pool = ThreadPoolExecutor(AT_ONCE)
        self._upload = retrying(lambda: store.begin_upload(self._url), self._url, "written")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is not None:
                return self._abort()
            self._complete()
        except BaseException:
            self._abort()
            raise
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def write(self, data: memoryview, position: int) -> None:
        """As Writer. Raises RequestError if a part could not be sent."""
        while data.nbytes:
            number, inside = divmod(position, PART)
            count = min(PART - inside, data.nbytes)
            self._fill(number, inside, data[:count])
            data, position = data[count:], position + count

    def _fill(self, number: int, inside: int, data: memoryview) -> None:
        with self._lock:
            part, filled = self._parts.get(number, (bytearray(), 0))
            if len(part) < inside + data.nbytes:
                part.extend(bytes(inside + data.nbytes - len(part)))
            part[inside : inside + data.nbytes] = data
            self._parts[number] = part, filled + data.nbytes
            whole = filled + data.nbytes == PART
            if whole:
                del self._parts[number]
        if whole:
            self._send(number, part)

    def _send(self, number: int, part: bytearray) -> None:
        for sent in self._sending:
            if sent.done():
                sent.result()
        self._slots.acquire()
        self._sending.append(self._pool.submit(self._sent, number, part))

    def _sent(self, number: int, part: bytearray) -> None:
        try:
            data = bytes(part)
            self._tags[number] = retrying(
                lambda: store.send_part(self._url, self._upload, number + 1, data), self._url, "written"
            )
        finally:
            self._slots.release()

    def _complete(self) -> None:
        rest = dict(sorted(self._parts.items()))
        assert all(len(part) == filled for part, filled in rest.values()), f"{self._url}: bytes were left out"
        for number, (part, _) in rest.items() or {0: (bytearray(), 0)}.items():
            self._send(number, part)
        for sent in self._sending:
            sent.result()
        tags = [self._tags[number] for number in range(len(self._tags))]
        retrying(lambda: store.complete_upload(self._url, self._upload, tags), self._url, "written")

    def _abort(self) -> None:
        """Have the store forget the parts, once none is on its way."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        with suppress(RequestError, FileNotFoundError):  # the error that led here is the one to be heard of
            retrying(lambda: store.abort_upload(self._url, self._upload), self._url, "written")


class _Spooled:
    def __init__(self, url: str) -> None:
        self._url, self._lock = url, threading.Lock()

    def __enter__(self) -> _Spooled:
        self._file = tempfile.NamedTemporaryFile(prefix="flm-upload-")
        return self

    def write(self, data: memoryview, position: int) -> None:
        """As Writer."""
        with self._lock:
            self._file.seek(position)
            self._file.write(data)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._file:
            if kind is None:
                self._file.flush()
                store.upload(Path(self._file.name), self._url)
