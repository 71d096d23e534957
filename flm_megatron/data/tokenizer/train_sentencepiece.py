"""Training of SentencePiece models."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from importlib import import_module
from typing import Any, Literal

from flm_megatron.errors import RequestError

CONTROLS = ("<unk>", "<s>", "</s>", "<pad>")
"""Pieces of the first ids: unknown (never used), beginning and end of a text, padding."""
UNK_ID, BOS_ID, EOS_ID, PAD_ID = range(4)
FIXED_IDS = 260
"""Control ids and bytes, before any piece."""
SPELLING = "".join(sorted(set("".join(CONTROLS)) | set("0123456789ABCDEFx")))
"""Letters in the names of control ids and bytes: with these as pieces, a text that holds such a name stays text."""


def train_sentencepiece(
    texts: Iterator[str], vocab_size: int, kind: Literal["bpe", "unigram"], longest_bytes: int
) -> bytes:
    """A byte-fallback model of `texts`, none above `longest_bytes`: nothing is normalised, spaces and line ends are
    kept, digits stand alone. The same text gives the same bytes.

    Raises:
        RequestError: the text is too small for `vocab_size`, or `vocab_size` too small for it.
    """
    import sentencepiece

    if vocab_size <= FIXED_IDS:
        raise RequestError(
            f"a vocabulary of {vocab_size} ids is too small: {FIXED_IDS} are control ids and bytes, before any piece"
        )
    model = io.BytesIO()
    required: dict[str, Any] = {"required_chars": SPELLING} if kind == "unigram" else {}
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=texts,
            model_writer=model,
            vocab_size=vocab_size,
            model_type=kind,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            **required,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            character_coverage=0.9995,
            max_sentence_length=longest_bytes,
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


def byte_sentencepiece() -> bytes:
    """A model of the control ids and the 256 bytes."""
    model_file = import_module("sentencepiece.sentencepiece_model_pb2")  # which has no types
    model = model_file.ModelProto()
    kinds = model_file.ModelProto.SentencePiece
    types = [kinds.UNKNOWN, *[kinds.CONTROL] * (len(CONTROLS) - 1), *[kinds.BYTE] * 256]
    names = [*CONTROLS, *(f"<0x{byte:02X}>" for byte in range(256))]
    for name, kind in zip(names, types, strict=True):
        model.pieces.add(piece=name, score=0.0, type=kind)
    trained, normalizer = model.trainer_spec, model.normalizer_spec
    trained.model_type, trained.vocab_size, trained.byte_fallback = model_file.TrainerSpec.CHAR, len(names), True
    trained.unk_id, trained.bos_id, trained.eos_id, trained.pad_id = UNK_ID, BOS_ID, EOS_ID, PAD_ID
    normalizer.name, normalizer.add_dummy_prefix = "identity", False
    normalizer.remove_extra_whitespaces, normalizer.escape_whitespaces = False, False
    return model.SerializeToString(deterministic=True)
