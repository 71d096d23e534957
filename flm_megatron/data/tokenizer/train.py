"""Training of tokenizers."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, get_args

from flm_megatron.data.tokenizer.base import Tokenizer
from flm_megatron.data.tokenizer.chunks import text_chunks
from flm_megatron.data.tokenizer.files import TIKTOKEN
from flm_megatron.data.tokenizer.opening import open_tokenizer
from flm_megatron.durable import make_folders, replace_file
from flm_megatron.errors import RequestError
from flm_megatron.paths import FilePath, require_file

CHUNK_CHARACTERS = 2048
LONGEST_BYTES = 8 * CHUNK_CHARACTERS
TrainedKind = Literal["bpe", "unigram", "bytes"]
DEFAULT_VOCABULARY = 32000


def train_tokenizer(
    texts: Iterable[str],
    out: FilePath,
    vocab_size: int | None = None,
    *,
    kind: TrainedKind = "bpe",
    text_bytes: int | None = None,
    max_bytes: int = 200_000_000,
    seed: int = 1234,
) -> Tokenizer:
    """Train a tokenizer on `texts` and write it as `out`: a `tokenizer.json` if that ends in .json, else SentencePiece.

    Every form gives every text back: nothing is normalised, spaces and line ends are kept, and what has no piece is
    written through its bytes. Digits stand alone. `bytes` takes no text: its ids are bytes and special tokens. At most
    about `max_bytes` of the text are used: an even random share of its chunks when `text_bytes`, the size of all of it,
    is given, else its beginning. The same text gives the same file.

    Raises:
        RequestError: `out` exists or has the name of a tiktoken file, there is no text, the text is too small for
            `vocab_size`, or that is given for bytes.
    """
    out = Path(out)
    if out.exists():
        raise RequestError(f"{out} exists: choose another name, or remove it first")
    if out.suffix == TIKTOKEN:
        raise RequestError(f"{out}: tiktoken files are read, not written: give a name that ends in .json or .model")
    if kind not in get_args(TrainedKind):
        raise RequestError(f"kind {kind!r} is not one of {', '.join(get_args(TrainedKind))}")
    require_file(out, "tokenizer")
    if kind == "bytes":
        data = _of_bytes(out, vocab_size)
    else:
        share = min(1.0, max_bytes / text_bytes) if text_bytes else 1.0
        sample = _not_empty(_sample(texts, share, max_bytes, random.Random(seed)))
        data = _trained(sample, out, DEFAULT_VOCABULARY if vocab_size is None else vocab_size, kind)
    make_folders(out.parent)
    replace_file(out, data)
    return open_tokenizer(out)


def _of_bytes(out: Path, vocab_size: int | None) -> bytes:
    from flm_megatron.data.tokenizer.train_json import byte_json
    from flm_megatron.data.tokenizer.train_sentencepiece import byte_sentencepiece

    if vocab_size is not None:
        raise RequestError(
            f"a vocabulary of {vocab_size} ids is asked for, but one of bytes has its size: leave it out"
        )
    return byte_json().encode() if out.suffix == ".json" else byte_sentencepiece()


def _trained(sample: Iterator[str], out: Path, vocab_size: int, kind: Literal["bpe", "unigram"]) -> bytes:
    from flm_megatron.data.tokenizer.train_json import train_bpe_json, train_unigram_json
    from flm_megatron.data.tokenizer.train_sentencepiece import train_sentencepiece

    if out.suffix != ".json":
        return train_sentencepiece(sample, vocab_size, kind, LONGEST_BYTES)
    if kind == "bpe":
        return train_bpe_json(sample, vocab_size).encode()
    return train_unigram_json(sample, vocab_size, LONGEST_BYTES).encode()


def _sample(texts: Iterable[str], share: float, max_bytes: int, generator: random.Random) -> Iterator[str]:
    used = 0
    for text in texts:
        for chunk in text_chunks(text, CHUNK_CHARACTERS):
            if used < max_bytes and generator.random() < share:
                used += len(chunk.encode())
                yield chunk


def _not_empty(chunks: Iterator[str]) -> Iterator[str]:
    """The chunks. Raises RequestError here if there are none: the libraries say it in words of their own."""
    first = next(chunks, None)
    if first is None:
        raise RequestError("there is no text to train a tokenizer on")
    return _all_of(first, chunks)


def _all_of(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest
