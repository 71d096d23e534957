"""Builds indexed datasets from text: encoded by many processes, written in the order of the input."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import shutil
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy
from tqdm import tqdm

from flm_megatron.data.corpus.description import LARGEST_COUNT, Description, file_of, refuse_too_many
from flm_megatron.data.tokenizer import Tokenizer, open_tokenizer
from flm_megatron.durable import make_folders, sync, sync_tree
from flm_megatron.engine.datasets import id_dtype, indexed_builder
from flm_megatron.errors import FlmError, RequestError
from flm_megatron.paths import FilePath, require_file

SUFFIXES = ("bin", "idx", "json")
BATCH_CHARACTERS = 500_000
MOST_WORKERS = 1024
# Batches in flight for each worker, so that reading neither waits for encoding nor runs away from it.
WINDOW = 4
VALIDATION = "_validation"


@dataclass(frozen=True)
class Encoded:
    """A document as ids [length], its end-of-document id included."""

    ids: numpy.ndarray
    text_bytes: int
    validation: bool


def build_dataset(
    documents: Iterable[str],
    tokenizer: Tokenizer,
    out: FilePath,
    *,
    workers: int = 1,
    validation_share: float = 0.0,
    total_bytes: int | None = None,
) -> dict[str, Description]:
    """Encode `documents` into OUT.bin, OUT.idx and OUT.json; returns what was written by prefix.

    With a `validation_share` about that share of the documents goes to OUT_validation instead; which ones follows
    from their text, so equal documents stay together. Documents without text are left out. The files are the
    same for any number of `workers`, and appear under their names only when they are whole. A progress bar over
    `total_bytes` is shown on a terminal.

    Raises:
        RequestError: a file exists already, the share is not in [0, 1), or a dataset would have no documents or more
            than can be numbered.
        FlmError: a worker died.
    """
    if not 0 <= validation_share < 1:
        raise RequestError(f"the validation share is {validation_share}, but has to be at least 0 and below 1")
    if not 1 <= workers <= MOST_WORKERS:
        raise RequestError(f"workers is {workers}, but has to be from 1 to {MOST_WORKERS}")
    prefixes = [Path(out), Path(f"{os.fspath(out)}{VALIDATION}")][: 2 if validation_share else 1]
    for prefix in prefixes:
        require_file(file_of(prefix, "json"), "dataset")
    _refuse_existing(prefixes)
    with _temporary_folder(Path(out)) as folder, _progress(total_bytes) as progress:
        writers = [Writer(folder / prefix.name, tokenizer) for prefix in prefixes]
        for document in _encode_all(documents, tokenizer.path, workers, validation_share):
            writers[document.validation].add(document)
            progress.update(document.text_bytes)
        descriptions = [writer.finish() for writer in writers]
        _refuse_existing(prefixes)
        sync_tree(folder)
        for prefix in prefixes:
            for suffix in SUFFIXES:
                file_of(folder / prefix.name, suffix).rename(file_of(prefix, suffix))
        sync(Path(out).parent)
    return {str(prefix): description for prefix, description in zip(prefixes, descriptions, strict=True)}


class Writer:
    """Writes one dataset through megatron-core's builder."""

    def __init__(self, prefix: Path, tokenizer: Tokenizer) -> None:
        """Open PREFIX.bin, to which documents are added in their order."""
        self._prefix, self._tokenizer = prefix, tokenizer
        self._dtype = id_dtype(tokenizer.vocab_size)
        self._builder = indexed_builder(str(file_of(prefix, "bin")), self._dtype)
        self._hash = hashlib.sha256()
        self._tokens = self._text_bytes = self._documents = 0

    def add(self, document: Encoded) -> None:
        """Append a document.

        Raises:
            RequestError: it is one document too many, or longer than an index can say.
        """
        refuse_too_many(self._documents + 1, self._prefix.name)
        if len(document.ids) > LARGEST_COUNT:
            raise RequestError(f"a document has {len(document.ids):,} tokens, more than {LARGEST_COUNT:,}: split it")
        ids = document.ids.astype(self._dtype)
        self._builder.add_document(ids, [len(ids)])
        self._hash.update(ids.tobytes())
        self._tokens += len(ids)
        self._text_bytes += document.text_bytes
        self._documents += 1

    def finish(self) -> Description:
        """Write the index and the description.

        Raises:
            RequestError: there were no documents.
        """
        if not self._documents:
            raise RequestError(f"dataset {self._prefix.name} would have no documents: give more text")
        self._builder.finalize(str(file_of(self._prefix, "idx")))
        description = Description(
            tokens=self._tokens,
            text_bytes=self._text_bytes,
            documents=self._documents,
            vocab_size=self._tokenizer.vocab_size,
            tokenizer=self._tokenizer.fingerprint,
            eod=self._tokenizer.eod,
            pad=self._tokenizer.pad,
            bin_bytes=file_of(self._prefix, "bin").stat().st_size,
            idx_bytes=file_of(self._prefix, "idx").stat().st_size,
            sha256=self._hash.hexdigest(),
        )
        description.write(file_of(self._prefix, "json"))
        return description


def _refuse_existing(prefixes: list[Path]) -> None:
    for prefix in prefixes:
        for suffix in SUFFIXES:
            if file_of(prefix, suffix).exists():
                raise RequestError(f"{file_of(prefix, suffix)} exists: choose another name, or remove it first")


@contextmanager
def _temporary_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out`, on its disk so that renaming is one step; removed at the end, whatever happens."""
    folder = out.parent / f".{out.name}.{os.getpid()}.partial"
    make_folders(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def _progress(total_bytes: int | None) -> tqdm[NoReturn]:
    return tqdm(total=total_bytes, unit="B", unit_scale=True, desc="encoding", disable=not sys.stderr.isatty())


def _encode_all(documents: Iterable[str], model: str, workers: int, share: float) -> Iterator[Encoded]:
    batches = _batches(documents)
    if workers == 1:
        _start_worker(model, share)
        for batch in batches:
            yield from _encode_batch(batch)
        return
    # Spawned, not forked: the parent may have threads by now.
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(workers, context, _start_worker, (model, share)) as pool:
            for encoded in _in_order(pool, batches, WINDOW * workers):
                yield from encoded
    except BrokenProcessPool:
        raise FlmError("an encoding process died (out of memory?): try fewer workers") from None


def _in_order(pool: Executor, batches: Iterable[list[str]], window: int) -> Iterator[list[Encoded]]:
    pending: deque[Future[list[Encoded]]] = deque()
    for batch in batches:
        pending.append(pool.submit(_encode_batch, batch))
        if len(pending) >= window:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for document in documents:
        if document:
            batch.append(document)
            size += len(document)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    yield batch


_worker: list[tuple[Tokenizer, float]] = []
"""In an encoding process: its tokenizer, and the fraction of documents for validation."""


def _start_worker(model: str, share: float) -> None:
    _worker[:] = [(open_tokenizer(model), share)]


def _encode_batch(texts: list[str]) -> list[Encoded]:
    [(tokenizer, share)] = _worker
    return [_encode(text, tokenizer, share) for text in texts]


def _encode(text: str, tokenizer: Tokenizer, share: float) -> Encoded:
    data = text.encode()
    # 53 bits: as many as a float in [0, 1) holds.
    place = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") >> 11
    ids = numpy.array([*tokenizer.encode(text), tokenizer.eod], dtype=numpy.int32)
    return Encoded(ids, len(data), place / 2**53 < share)
