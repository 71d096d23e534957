"""Builds indexed datasets from text: encoded by many processes, written in the order of the input, gone on with after a
kill."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import NoReturn

import numpy
from filelock import FileLock, Timeout
from tqdm import tqdm

from flm_megatron.data.corpus.building.encoding import Encoded, Reader, Recipe, encode_all
from flm_megatron.data.corpus.building.progress import NAME, Progress, read_progress
from flm_megatron.data.corpus.building.writer import Writer, Written
from flm_megatron.data.corpus.description import Description, file_of, read_description
from flm_megatron.data.duplicates import PERMUTATIONS, NearDuplicates
from flm_megatron.data.tokenizer import Tokenizer
from flm_megatron.durable import make_folders, sync, sync_tree
from flm_megatron.errors import RequestError
from flm_megatron.paths import FilePath, require_file

SUFFIXES = ("bin", "idx", "json")
MOST_WORKERS = 1024
VALIDATION = "_validation"
LOCK = "lock"
HASHES = "hashes"
SAVED_EVERY_SECONDS = 10.0


@dataclass(frozen=True)
class BuildOptions:
    """How a dataset is built.

    With a `validation_share` about that share of the documents goes to PREFIX_validation instead; which ones follows
    from their text, so equal documents stay together. `exact` leaves out documents whose bytes occurred before, `near`
    those whose similarity to one kept before is at least that. With an `identity`, which stands for the input, a build
    that was killed is gone on with.
    """

    workers: int = 1
    validation_share: float = 0.0
    exact: bool = False
    near: float | None = None
    identity: str | None = None

    def check(self) -> None:
        """Raise RequestError if a number is out of range."""
        if not 0 <= self.validation_share < 1:
            raise RequestError(f"the validation share is {self.validation_share}, but has to be at least 0 and below 1")
        if not 1 <= self.workers <= MOST_WORKERS:
            raise RequestError(f"workers is {self.workers}, but has to be from 1 to {MOST_WORKERS}")


@dataclass
class Built:
    """What a build made: descriptions by prefix; documents that were left out; what this process encoded, and in how
    many seconds."""

    datasets: dict[str, Description] = field(default_factory=dict)
    copies: int = 0
    near: int = 0
    text_bytes: int = 0
    tokens: int = 0
    seconds: float = 0.0
    resumed: int = 0
    """Documents that were read before."""


def build_dataset(
    documents: Iterable[str],
    tokenizer: Tokenizer,
    out: FilePath,
    *,
    workers: int = 1,
    validation_share: float = 0.0,
    total_bytes: int | None = None,
) -> dict[str, Description]:
    """As `build`; returns what was written by prefix."""
    return build(documents, tokenizer, out, BuildOptions(workers, validation_share), total_bytes).datasets


def build(
    documents: Iterable[str],
    tokenizer: Tokenizer,
    out: FilePath,
    options: BuildOptions,
    total_bytes: int | None = None,
) -> Built:
    """Encode `documents` into OUT.bin, OUT.idx and OUT.json.

    Documents without text are left out. The files are the same for any number of workers, and however often the build
    was killed, and appear under their names only when they are whole. A progress bar over `total_bytes` is shown on a
    terminal.

    Raises:
        RequestError: a file exists already, an option is out of range, or a dataset would have no documents or more
            than can be numbered; the same dataset is being built.
        FlmError: a worker died.
    """
    options.check()
    out = Path(out)
    prefixes = [out, Path(f"{out}{VALIDATION}")][: 2 if options.validation_share else 1]
    for prefix in prefixes:
        require_file(file_of(prefix, "json"), "dataset")
    identity = _identity(options, tokenizer)
    with _folder(out, options.identity is not None, prefixes) as folder:
        saved = read_progress(folder, identity)
        if not (saved and saved.whole and _can_publish(folder, prefixes)):
            saved = None if saved and saved.whole else saved
            _refuse_existing(prefixes)
            _clear(folder, keep=saved is not None)
            building = Building(folder, prefixes, tokenizer, options, saved or Progress(identity))
            built = building.run(documents, total_bytes)
            _refuse_existing(prefixes)
            sync_tree(folder)
            building.progress(whole=True).write(folder)
        else:
            built = Built(copies=saved.copies, near=saved.near, resumed=saved.read)
        _publish(folder, prefixes)
    built.datasets = {str(prefix): read_description(prefix) for prefix in prefixes}
    return built


class Building:
    """A build from where it is to its end, in a folder."""

    def __init__(
        self, folder: Path, prefixes: list[Path], tokenizer: Tokenizer, options: BuildOptions, start: Progress
    ) -> None:
        """Go on after `start`."""
        self._folder, self._options, self._start = folder, options, start
        written = start.written or [Written()] * len(prefixes)
        self._writers = [
            Writer(folder / prefix.name, tokenizer, each) for prefix, each in zip(prefixes, written, strict=True)
        ]
        self._recipe = Recipe(tokenizer.path, options.validation_share, options.near is not None)
        self._read, self._copies, self._near = start.read, start.copies, start.near
        self._saved = time.monotonic()
        self._kept = None if options.near is None else _Kept(folder / HASHES, options.near, self._documents())

    def run(self, documents: Iterable[str], total_bytes: int | None) -> Built:
        """Encode what is left, and finish the files. Raises as `build`."""
        begun, before = time.monotonic(), self._totals()
        reader = Reader(documents, self._options.exact, self._start.read)
        with _progress(total_bytes) as bar:
            bar.update(before.text_bytes)
            for texts, encoded in encode_all(reader.batches(), self._recipe, self._options.workers):
                self._add(encoded)
                self._read, self._copies = texts.read, texts.copies
                bar.update(int(encoded.text_bytes.sum()))
                self._save()
        for writer in self._writers:
            writer.finish()
        after, seconds = self._totals(), time.monotonic() - begun
        return Built(
            copies=self._copies,
            near=self._near,
            text_bytes=after.text_bytes - before.text_bytes,
            tokens=after.tokens - before.tokens,
            seconds=seconds,
            resumed=self._start.read,
        )

    def progress(self, whole: bool = False) -> Progress:
        """How far it is."""
        written = [writer.written for writer in self._writers]
        return Progress(self._start.identity, self._read, self._copies, self._near, written, whole)

    def _totals(self) -> Written:
        return Written(*numpy.sum([writer.written for writer in self._writers], axis=0).tolist())

    def _documents(self) -> int:
        return self._totals().documents

    def _add(self, encoded: Encoded) -> None:
        """Write those that are kept, each to its dataset."""
        kept = numpy.ones(len(encoded.lengths), bool)
        if self._kept is not None and encoded.hashes is not None:
            kept = numpy.array([self._kept.add(hashed) for hashed in encoded.hashes], bool)
            self._near += int((~kept).sum())
        for writer, side in zip(self._writers, (~encoded.validation, encoded.validation), strict=False):
            chosen = kept & side
            if chosen.any():
                ids = encoded.ids if chosen.all() else encoded.ids[numpy.repeat(chosen, encoded.lengths)]
                writer.add(ids, encoded.lengths[chosen], int(encoded.text_bytes[chosen].sum()))

    def _save(self) -> None:
        """Save how far it is, now and then."""
        if self._options.identity is None or time.monotonic() - self._saved < SAVED_EVERY_SECONDS:
            return
        for writer in self._writers:
            writer.sync()
        if self._kept is not None:
            self._kept.sync()
        sync(self._folder)  # the names of these files too, before what counts on them
        self.progress().write(self._folder)
        self._saved = time.monotonic()


class _Kept:
    """Documents that were kept, by their MinHash, in a file as well."""

    def __init__(self, path: Path, similarity: float, documents: int) -> None:
        """Of the file the first `documents` are kept."""
        self._found, self._file, self._count = NearDuplicates(similarity), path.open("a+b"), documents
        self._file.truncate(documents * PERMUTATIONS * 8)
        self._file.seek(0)
        for number in range(documents):
            hashed = numpy.frombuffer(self._file.read(PERMUTATIONS * 8), "<u8")
            self._found.keep(number, hashed)

    def add(self, hashed: numpy.ndarray) -> bool:
        """Whether it is near none, and kept."""
        if self._found.like(hashed, self._count) is not None:
            return False
        self._file.write(hashed.astype("<u8").tobytes())
        self._count += 1
        return True

    def sync(self) -> None:
        """Force to disk what was added."""
        self._file.flush()
        os.fsync(self._file.fileno())


def _identity(options: BuildOptions, tokenizer: Tokenizer) -> str:
    """Stands for what a build makes; the number of workers does not change that.

    The id that ends a document may come from beside the tokenizer's file, whose fingerprint then does not tell.
    """
    made_by = (tokenizer.fingerprint, tokenizer.eod)
    parts = (options.identity, options.validation_share, options.exact, options.near, *made_by)
    return sha256(repr(parts).encode()).hexdigest()


def _refuse_existing(prefixes: list[Path]) -> None:
    for prefix in prefixes:
        for suffix in SUFFIXES:
            if file_of(prefix, suffix).exists():
                raise RequestError(f"{file_of(prefix, suffix)} exists: choose another name, or remove it first")


def _places(folder: Path, prefixes: list[Path]) -> list[tuple[Path, Path]]:
    """Where each file is made, and where it belongs; descriptions come last."""
    return [
        (file_of(folder / prefix.name, suffix), file_of(prefix, suffix)) for suffix in SUFFIXES for prefix in prefixes
    ]


def _can_publish(folder: Path, prefixes: list[Path]) -> bool:
    """Whether every file of a whole build is either still in its folder or under its name."""
    return all(made.exists() != target.exists() for made, target in _places(folder, prefixes))


def _publish(folder: Path, prefixes: list[Path]) -> None:
    for made, target in _places(folder, prefixes):
        if made.exists():
            made.rename(target)
    sync(prefixes[0].parent)


def _clear(folder: Path, keep: bool) -> None:
    """Remove what an earlier build of something else left in a folder."""
    for path in folder.iterdir():
        if not keep and path.name != LOCK:
            path.unlink()


@contextmanager
def _folder(out: Path, resumable: bool, prefixes: list[Path]) -> Iterator[Path]:
    """A folder beside `out`, on its disk so that renaming is one step.

    It is removed at the end, except after an error that is not of the input, such as a process that died: then
    what was saved in it is gone on with.
    """
    folder = out.parent / (f".{out.name}.partial" if resumable else f".{out.name}.{os.getpid()}.partial")
    if not folder.exists():
        _refuse_existing(prefixes)
    make_folders(folder)
    try:
        with FileLock(folder / LOCK, timeout=0):
            keep = False
            try:
                yield folder
            except RequestError:
                raise
            except BaseException:
                keep = resumable and (folder / NAME).exists()
                raise
            finally:
                if not keep:
                    shutil.rmtree(folder)
    except Timeout:
        raise RequestError(f"{out} is being built by another process: wait for it, or choose another --out") from None


def _progress(total_bytes: int | None) -> tqdm[NoReturn]:
    return tqdm(total=total_bytes, unit="B", unit_scale=True, desc="encoding", disable=not sys.stderr.isatty())
