"""A tiktoken file as the `tokenizer.json` of the same ids, for programs that read only that."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from flm_megatron.data.tokenizer.byte_letters import byte_letters
from flm_megatron.data.tokenizer.tiktoken import TiktokenTokenizer
from flm_megatron.errors import RequestError

PROBES = (
    "It's 12345 o'clock, IT'LL rain:\tdon't.\r\n\r\n  def f(x):\n        return {'a': [1, 2_000]}   \n",
    "日本語と中文 mixed 한국어 ½ Ⅷ été e\u0301 👩‍👩‍👧‍👦 \ufeff\u0000",
    "   leading, trailing   \n\n\n\t\t ",
    "in the\nin the",
    "CamelCase HTTPServer snake_case 3.14159 +-*/ (((a))) ...",
)
"""Texts in which patterns differ that are not read alike."""


def tokenizer_json(source: TiktokenTokenizer) -> str:
    """The text of a `tokenizer.json` with the ids of `source`.

    Raises:
        RequestError: the library `tokenizers` reads its pattern in another way than `tiktoken` does.
    """
    ranks, special = source.ranks, source.special_tokens
    letters = byte_letters()

    def spelt(token: bytes) -> str:
        """The token in the letters that stand for bytes in a `tokenizer.json`."""
        return "".join(letters[byte] for byte in token)

    vocabulary = {spelt(token): rank for token, rank in ranks.items()} | dict(special)
    parts = (_merged(token, ranks) for token in sorted(ranks, key=ranks.__getitem__) if len(token) > 1)
    merges = [(spelt(pair[0]), spelt(pair[1])) for pair in parts if len(pair) == 2]
    found = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    try:
        split = pre_tokenizers.Split(tokenizers.Regex(source.description.pattern), "isolated")
    except Exception as error:  # the library raises its base class
        raise RequestError(f"{source.path}: `tokenizers` cannot read its pattern: {error}") from None
    found.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    found.decoder = decoders.ByteLevel()
    found.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in special])
    if any(found.encode(text).ids != source.encode(text) for text in PROBES):
        raise RequestError(
            f"{source.path}: `tokenizers` cuts text by its pattern in another way than `tiktoken` does, so it cannot "
            "be written as a tokenizer.json: give the model's own with --tokenizer"
        )
    return found.to_str()


def _merged(token: bytes, ranks: Mapping[bytes, int]) -> list[bytes]:
    """The parts of a token just before its own merge: those that lower ranks make of its bytes."""
    parts, own = [token[i : i + 1] for i in range(len(token))], ranks[token]
    while len(parts) > 2:
        found = [(ranks.get(one + two, own), place) for place, (one, two) in enumerate(pairwise(parts))]
        rank, place = min(found)
        if rank >= own:
            break
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts
