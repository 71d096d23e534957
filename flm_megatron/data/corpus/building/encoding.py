"""Documents encoded by many processes, given back in their order."""

from __future__ import annotations

import hashlib
import multiprocessing
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice

import numpy

from flm_megatron.data.duplicates import minhash
from flm_megatron.data.tokenizer import Tokenizer, open_tokenizer
from flm_megatron.errors import FlmError

BATCH_CHARACTERS = 500_000
# Batches in flight for each worker, so that reading neither waits for encoding nor runs away from it.
WINDOW = 4


@dataclass(frozen=True)
class Recipe:
    """What is done to a document: encoded by `tokenizer`, a share put aside, and hashed if near ones are left out."""

    tokenizer: str
    validation_share: float
    near: bool = False


@dataclass(frozen=True)
class Texts:
    """Documents that are encoded together, and how many were read and found to be copies up to their end."""

    texts: list[str]
    read: int
    copies: int


@dataclass(frozen=True)
class Encoded:
    """Documents as ids.

    `ids` are those of all, end-of-document ids included; `lengths`, `text_bytes` and `validation` have an entry for
    each document, and `hashes`, if near ones are left out, its MinHash [documents, permutations].
    """

    ids: numpy.ndarray
    lengths: numpy.ndarray
    text_bytes: numpy.ndarray
    validation: numpy.ndarray
    hashes: numpy.ndarray | None


class Reader:
    """Documents in batches; those without text are left out, and with `exact` those that occurred before."""

    def __init__(self, documents: Iterable[str], exact: bool, skip: int = 0) -> None:
        """The first `skip` documents are read again, for what they say of copies, and not given."""
        self._documents, self._skip = iter(documents), skip
        self._seen: set[bytes] | None = set() if exact else None
        self._copies = 0

    def batches(self) -> Iterator[Texts]:
        """The documents, about as many characters at a time; the last batch may be empty."""
        for document in islice(self._documents, self._skip):
            self._is_new(document)
        batch: list[str] = []
        size, read = 0, self._skip
        for document in self._documents:
            read += 1
            if document and self._is_new(document):
                batch.append(document)
                size += len(document)
            if size >= BATCH_CHARACTERS:
                yield Texts(batch, read, self._copies)
                batch, size = [], 0
        yield Texts(batch, read, self._copies)

    def _is_new(self, document: str) -> bool:
        if self._seen is None or not document:
            return True
        key = hashlib.blake2b(document.encode(), digest_size=16).digest()
        if key in self._seen:
            self._copies += 1
            return False
        self._seen.add(key)
        return True


def encode_all(batches: Iterable[Texts], recipe: Recipe, workers: int) -> Iterator[tuple[Texts, Encoded]]:
    """Every batch and what it is as ids, in order.

    Raises:
        FlmError: a worker died.
    """
    if workers == 1:
        _start_worker(recipe)
        for batch in batches:
            yield batch, _encode(batch.texts)
        return
    # Spawned, not forked: the parent may have threads by now.
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(workers, context, _start_worker, (recipe,)) as pool:
            yield from _in_order(pool, batches, WINDOW * workers)
    except BrokenProcessPool:
        raise FlmError("an encoding process died (out of memory?): try fewer workers") from None


def _in_order(pool: Executor, batches: Iterable[Texts], window: int) -> Iterator[tuple[Texts, Encoded]]:
    pending: deque[tuple[Texts, Future[Encoded]]] = deque()
    for batch in batches:
        pending.append((batch, pool.submit(_encode, batch.texts)))
        if len(pending) >= window:
            done, future = pending.popleft()
            yield done, future.result()
    while pending:
        done, future = pending.popleft()
        yield done, future.result()


_worker: list[tuple[Tokenizer, Recipe]] = []
"""In an encoding process: its tokenizer, and what it does."""


def _start_worker(recipe: Recipe) -> None:
    _worker[:] = [(open_tokenizer(recipe.tokenizer), recipe)]


def _encode(texts: list[str]) -> Encoded:
    [(tokenizer, recipe)] = _worker
    encoded = [numpy.array([*tokenizer.encode(text), tokenizer.eod], dtype=numpy.int32) for text in texts]
    data = [text.encode() for text in texts]
    return Encoded(
        ids=numpy.concatenate(encoded) if encoded else numpy.zeros(0, numpy.int32),
        lengths=numpy.array([len(ids) for ids in encoded], numpy.int64),
        text_bytes=numpy.array([len(each) for each in data], numpy.int64),
        validation=numpy.array([_place(each) < recipe.validation_share for each in data], bool),
        hashes=numpy.stack([minhash(text) for text in texts]) if recipe.near and texts else None,
    )


def _place(data: bytes) -> float:
    """A number in [0, 1) that follows from the text."""
    # 53 bits: as many as a float in [0, 1) holds.
    return (int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") >> 11) / 2**53
