"""Training of tokenizers."""

from __future__ import annotations

import io
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

from flm_megatron.data.tokenizer.base import Tokenizer
from flm_megatron.data.tokenizer.chunks import text_chunks
from flm_megatron.data.tokenizer.opening import open_tokenizer
from flm_megatron.durable import make_folders, replace_file
from flm_megatron.errors import RequestError
from flm_megatron.paths import FilePath, require_file

UNK_ID, BOS_ID, EOS_ID, PAD_ID = range(4)
FIXED_IDS = 260
TRAINING_CHUNK_CHARACTERS = 2048


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
    return open_tokenizer(out)


def _sample(texts: Iterable[str], share: float, max_bytes: int, generator: random.Random) -> Iterator[str]:
    used = 0
    for text in texts:
        for chunk in text_chunks(text, TRAINING_CHUNK_CHARACTERS):
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
