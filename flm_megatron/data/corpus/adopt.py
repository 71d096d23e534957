"""Describes an indexed dataset that another program made, in place: Megatron-LM's preprocess_data.py and its like."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy

from flm_megatron.data.corpus.description import Description, file_of, refuse_too_many
from flm_megatron.data.corpus.index_file import Index, open_any_index
from flm_megatron.data.tokenizer import Tokenizer
from flm_megatron.durable import make_folders, replace_file, sync
from flm_megatron.errors import DamagedError, RequestError, read_error
from flm_megatron.paths import FilePath, require_file

SAMPLED_DOCUMENTS, SAMPLED_IDS = 512, 4096
"""How many documents, and how many ids of each, are decoded to estimate the bytes of the text."""
IDS_AT_ONCE = 2**22
SHOWN_CHARACTERS = 60


@dataclass(frozen=True)
class Adopted:
    """What was found: the description that was written, documents that end with the end-of-document id, how the first
    one begins, and the share of the sampled text that is U+FFFD, which decoding writes for bytes that are no text."""

    description: Description
    ended: int
    beginning: str
    unreadable: float


def adopt_dataset(
    prefix: FilePath, tokenizer: Tokenizer, out: FilePath | None = None, progress: Callable[[int], object] | None = None
) -> Adopted:
    """Check PREFIX.bin and PREFIX.idx, and write PREFIX.json, without which no run takes them; neither is changed.

    All ids are read once. Bytes of the text are an estimate: of up to 512 documents over the whole dataset the first
    4096 ids are decoded. With `out`, for a folder that cannot be written, OUT.json is written instead, with links to
    the other two beside it. `progress` is called with the bytes read since its last call.

    Raises:
        RequestError: a file is missing, the description exists, documents were split into sentences, or there are
            none; ids that the tokenizer does not have.
        DamagedError: the index is none, or not that of the .bin.
    """
    out = prefix if out is None else out
    for suffix in ("bin", "idx"):
        if not file_of(prefix, suffix).is_file():
            raise RequestError(
                f"dataset {prefix}: {file_of(prefix, suffix)} is missing: give the prefix of a .bin and .idx"
            )
    for suffix in ("json",) if out == prefix else ("json", "bin", "idx"):
        if os.path.lexists(file_of(out, suffix)):
            raise RequestError(f"{file_of(out, suffix)} exists: choose another --out, or remove it first")
    require_file(file_of(out, "json"), "description")
    index = open_any_index(file_of(prefix, "idx"))
    _check_index(index, prefix)
    found = _read(index, prefix, tokenizer, progress)
    _write(prefix, out, found.description)
    return found


def _check_index(index: Index, prefix: FilePath) -> None:
    """Check that the index is whole, that of the .bin, and of documents that were not split."""
    if not len(index.lengths):
        raise RequestError(f"dataset {prefix} has no documents: there is nothing to train on")
    refuse_too_many(len(index.lengths), prefix)
    if index.split():
        raise RequestError(
            f"dataset {prefix} holds documents as several sequences (preprocess_data.py --split-sentences, for BERT), "
            "which would be shuffled apart: make it again without that option"
        )
    index.check()
    path = file_of(prefix, "bin")
    if index.end != (size := path.stat().st_size):
        raise DamagedError(
            f"{index.path} does not fit {path}: the last document ends at byte {index.end:,} of {size:,}"
        )


def _read(index: Index, prefix: FilePath, tokenizer: Tokenizer, progress: Callable[[int], object] | None) -> Adopted:
    """Read all ids once."""
    path, digest, ended = file_of(prefix, "bin"), hashlib.sha256(), 0
    for data, ends in _blocks(index, path):
        digest.update(data.tobytes())
        low, high = int(data.min()), int(data.max())
        if low < 0 or high >= tokenizer.vocab_size:
            raise RequestError(
                f"{path} holds id {low if low < 0 else high}, but tokenizer {tokenizer.path} has "
                f"{tokenizer.vocab_size} ids: give the tokenizer that the dataset was made with"
            )
        ended += int((data[ends] == tokenizer.eod).sum())
        if progress:
            progress(data.nbytes)
    tokens = int(index.lengths.sum(dtype=numpy.int64))
    per_token, beginning, unreadable = _decoded(index, path, tokenizer)
    description = Description(
        tokens=tokens,
        text_bytes=round(per_token * tokens),
        documents=len(index.lengths),
        vocab_size=tokenizer.vocab_size,
        tokenizer=tokenizer.fingerprint,
        eod=tokenizer.eod,
        pad=tokenizer.pad,
        bin_bytes=path.stat().st_size,
        idx_bytes=index.path.stat().st_size,
        sha256=digest.hexdigest(),
        version=2,
        adopted=True,
    )
    return Adopted(description, ended, beginning, unreadable)


def _blocks(index: Index, path: Path) -> Iterator[tuple[numpy.ndarray, numpy.ndarray]]:
    """Ids of stretches of whole documents, or of parts of a long one, and where in them documents end."""
    try:
        ids = numpy.memmap(path, dtype=index.dtype, mode="r")
    except OSError as error:
        raise read_error(path, error) from error
    ends = (index.places // index.id_bytes + index.lengths - 1).astype(numpy.int64)
    for start in range(0, len(ids), IDS_AT_ONCE):
        stop = min(start + IDS_AT_ONCE, len(ids))
        first, last = numpy.searchsorted(ends, [start, stop])
        yield ids[start:stop], ends[first:last] - start


def _decoded(index: Index, path: Path, tokenizer: Tokenizer) -> tuple[float, str, float]:
    """Bytes of text per id, over a sample; the beginning of the first document; the share of U+FFFD in the sample."""
    ids = numpy.memmap(path, dtype=index.dtype, mode="r")
    count = len(index.lengths)
    tokens = characters = nbytes = unreadable = 0
    beginning = ""
    for document in numpy.unique(numpy.linspace(0, count - 1, min(count, SAMPLED_DOCUMENTS)).astype(numpy.int64)):
        start = int(index.places[document]) // index.id_bytes
        taken = ids[start : start + min(int(index.lengths[document]), SAMPLED_IDS)]
        text = tokenizer.decode(taken.tolist())
        beginning = beginning or text[:SHOWN_CHARACTERS]
        tokens, nbytes, characters = tokens + len(taken), nbytes + len(text.encode()), characters + len(text)
        unreadable += text.count("\N{REPLACEMENT CHARACTER}")
    return nbytes / tokens, beginning, unreadable / max(characters, 1)


def _write(prefix: FilePath, out: FilePath, description: Description) -> None:
    """Write the description, last of all that a dataset is made of."""
    try:
        make_folders(file_of(out, "json").parent)
        if out != prefix:
            for suffix in ("bin", "idx"):
                file_of(out, suffix).symlink_to(file_of(prefix, suffix).absolute())
            sync(file_of(out, "json").parent)
        replace_file(file_of(out, "json"), description.to_bytes())
    except OSError as error:
        raise RequestError(f"{file_of(out, 'json')} cannot be written: {error.strerror or error}") from None
