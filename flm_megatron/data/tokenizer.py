"""A SentencePiece tokenizer that gives back every text exactly, and its training."""

from __future__ import annotations

import hashlib
import io
import random
import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

import sentencepiece

from flm_megatron.durable import make_folders, replace_file
from flm_megatron.errors import DamagedError, RequestError
from flm_megatron.paths import FilePath, require_file
from flm_megatron.storage.cache.whole import file_at

UNK_ID, BOS_ID, EOS_ID, PAD_ID = range(4)
FIXED_IDS = 260
# SentencePiece writes a space as this character, so the character itself has to go through its bytes.
SPACE_SYMBOL = "\u2581"
# Pieces of a text are found within chunks of about this many characters, which bounds time and memory.
CHUNK_CHARACTERS = 65536
TRAINING_CHUNK_CHARACTERS = 2048


class Tokenizer:
    """A trained SentencePiece model: text to ids and back, without loss, adding no ids of its own."""

    def __init__(self, model: FilePath) -> None:
        """Load the model file `model`, a path or a URL.

        Raises:
            RequestError: it is not there, or it lacks what a lossless tokenizer needs.
            DamagedError: it is not a SentencePiece model.
        """
        self.path = str(model)
        file = file_at(model)
        if file is None:
            raise RequestError(f"tokenizer {model} is not there: train one with `flm data tokenizer`")
        self._data = file.read_bytes()
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=self._data or b"empty")
        except (RuntimeError, ValueError):  # its words are of its own source code
            raise DamagedError(f"{model} is not a SentencePiece model ({len(self._data):,} bytes)") from None
        if self._model.eos_id() < 0:
            raise RequestError(f"tokenizer {model} has no end-of-sequence id, which ends every document")

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return self._model.vocab_size()

    @property
    def eod(self) -> int:
        """Id that ends a document (the model's eos)."""
        return self._model.eos_id()

    @property
    def bos(self) -> int:
        """Id of the beginning of a text; -1 if the model has none. Never added by `encode`."""
        return self._model.bos_id()

    @property
    def pad(self) -> int:
        """Id of padding; -1 if the model has none."""
        return self._model.pad_id()

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the model file: the tokenizer's identity."""
        return hashlib.sha256(self._data).hexdigest()

    @cached_property
    def _space_symbol_ids(self) -> list[int]:
        pieces = [f"<0x{byte:02X}>" for byte in SPACE_SYMBOL.encode()]
        return [self._model.piece_to_id(piece) for piece in pieces]

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without bos or eos.

        Long texts are cut into chunks at line ends, the same way every time. With a byte-fallback model that
        normalises nothing (as `train_tokenizer` makes) `decode` gives the text back exactly.
        """
        ids: list[int] = []
        for chunk in _chunks(text, CHUNK_CHARACTERS):
            for number, part in enumerate(chunk.split(SPACE_SYMBOL)):
                ids += (self._space_symbol_ids if number else []) + self._model.encode(part)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; bos, eos and pad give nothing."""
        return self._model.decode([int(i) for i in ids])


def file_fingerprint(path: FilePath) -> str | None:
    """The `fingerprint` of a tokenizer that lies at `path`; none if no file is there or it cannot be read."""
    try:
        file = file_at(path)
        return hashlib.sha256(file.read_bytes()).hexdigest() if file else None
    except (OSError, RequestError):
        return None


def _chunks(text: str, size: int) -> Iterator[str]:
    """`text` in pieces of at most `size` characters, cut after the last line end where there is one."""
    start = 0
    while start < len(text):
        end = min(start + size, len(text))
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        yield text[start:end]
        start = end


def train_tokenizer(
    texts: Iterable[str],
    out: FilePath,
    vocab_size: int,
    *,
    text_bytes: int | None = None,
    max_bytes: int = 200_000_000,
    seed: int = 1234,
) -> Tokenizer:
    """Train a byte-fallback BPE on `texts` and write the model file `out`.

    Ids 0 to 3 are unk, bos, eos and pad, the next 256 are bytes; nothing is normalised, spaces and line ends are
    kept, digits stand alone. At most about `max_bytes` of the text are used: an even random share of its chunks
    when `text_bytes`, the size of all of it, is given, else its beginning. The same text gives the same file.

    Raises:
        RequestError: `out` exists, there is no text, or the text is too small for `vocab_size`.
    """
    out = Path(out)
    if out.exists():
        raise RequestError(f"{out} exists: choose another name, or remove it first")
    require_file(out, "tokenizer")
    if vocab_size <= FIXED_IDS:
        raise RequestError(
            f"a vocabulary of {vocab_size} ids is too small: {FIXED_IDS} are control ids and bytes, before any piece"
        )
    share = min(1.0, max_bytes / text_bytes) if text_bytes else 1.0
    data = _train(_sample(texts, share, max_bytes, random.Random(seed)), vocab_size)
    make_folders(out.parent)
    replace_file(out, data)
    return Tokenizer(out)


def _sample(texts: Iterable[str], share: float, max_bytes: int, generator: random.Random) -> Iterator[str]:
    used = 0
    for text in texts:
        for chunk in _chunks(text, TRAINING_CHUNK_CHARACTERS):
            if used < max_bytes and generator.random() < share:
                used += len(chunk.encode())
                yield chunk


def _train(chunks: Iterator[str], vocab_size: int) -> bytes:
    first = next(chunks, None)
    if first is None:
        raise RequestError("there is no text to train a tokenizer on")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_all_of(first, chunks),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            character_coverage=0.9995,
            max_sentence_length=8 * TRAINING_CHUNK_CHARACTERS,
            unk_id=UNK_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            pad_id=PAD_ID,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise RequestError(_unfit_vocabulary(str(error), vocab_size)) from None
    return model.getvalue()


def _unfit_vocabulary(error: str, vocab_size: int) -> str:
    """SentencePiece's message about a vocabulary, without the lines of its source code."""
    most, least = re.search(r"value <= (\d+)", error), re.search(r"required_chars\. \d+ vs (\d+)", error)
    if most:
        return f"a vocabulary of {vocab_size} ids is too large for this text: give at most {most[1]}, or more text"
    if least:
        return f"a vocabulary of {vocab_size} ids is too small for this text's characters: give at least {least[1]}"
    return f"SentencePiece cannot make a vocabulary of {vocab_size} ids of this text: {error.split('] ')[-1]}"


def _all_of(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest
