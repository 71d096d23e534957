"""Training of `tokenizer.json` files."""

from __future__ import annotations

from collections.abc import Iterator

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from flm_megatron.data.tokenizer.byte_letters import byte_letters
from flm_megatron.data.tokenizer.train_sentencepiece import CONTROLS, FIXED_IDS, UNK_ID, train_sentencepiece
from flm_megatron.errors import RequestError

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Where text is cut before pairs of bytes are merged: words with the space before them, single digits, line ends."""
SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>", "<|pad|>")
"""Beginning and end of a text and padding, which open_tokenizer knows by these names."""
SPACE_SYMBOL = "\u2581"
NEVER = -1e6
"""Score of pieces that no text is cut into: names of control ids and bytes."""


def train_bpe_json(texts: Iterator[str], vocab_size: int) -> str:
    """A byte-level BPE: special tokens, the 256 bytes, then merges. The same text gives the same file.

    Raises:
        RequestError: the text is too small for `vocab_size`, or that is no more than bytes and special tokens.
    """
    fixed = 256 + len(SPECIAL)
    if vocab_size <= fixed:
        raise RequestError(
            f"a vocabulary of {vocab_size} ids is too small: {fixed} are special tokens and bytes, before any merge"
        )
    found = _byte_level(models.BPE(), PATTERN)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL), initial_alphabet=byte_letters(), show_progress=False
    )
    found.train_from_iterator(texts, trainer)
    if (most := found.get_vocab_size()) < vocab_size:
        raise RequestError(
            f"a vocabulary of {vocab_size} ids is too large for this text: give at most {most}, or more text"
        )
    return found.to_str(pretty=True)


def train_unigram_json(texts: Iterator[str], vocab_size: int, longest_bytes: int) -> str:
    """The unigram model that SentencePiece trains, with a space for its symbol of one: `tokenizers` would train another
    one each time. Raises RequestError as `train_sentencepiece`."""
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(
        model_proto=train_sentencepiece(texts, vocab_size, "unigram", longest_bytes)
    )
    pieces = [
        (
            model.id_to_piece(number).replace(SPACE_SYMBOL, " "),
            model.get_score(number) if number >= FIXED_IDS else NEVER,
        )
        for number in range(model.get_piece_size())
    ]
    found = tokenizers.Tokenizer(models.Unigram(pieces, UNK_ID, byte_fallback=True))
    found.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    found.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in CONTROLS])
    return found.to_str(pretty=True)


def byte_json() -> str:
    """Bytes as ids 0 to 255, then the special tokens."""
    found = _byte_level(models.BPE({letter: byte for byte, letter in enumerate(byte_letters())}, []))
    found.add_special_tokens(list(SPECIAL))
    return found.to_str(pretty=True)


def _byte_level(model: models.BPE, pattern: str | None = None) -> tokenizers.Tokenizer:
    """A tokenizer of `model` over the bytes of a text, which is cut by `pattern` first."""
    found = tokenizers.Tokenizer(model)
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")] if pattern else []
    found.pre_tokenizer = pre_tokenizers.Sequence([*split, letters])
    found.decoder = decoders.ByteLevel()
    return found
