"""Rank files of tiktoken: lines of a token in base64 and its rank. How text is cut first, and the special tokens, do
not stand in them: a file FILE.json beside FILE says them (docs/tokenizers.md has those of published files)."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import field
from functools import cached_property
from typing import Annotated

import tiktoken
from annotated_types import Ge
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from flm_megatron.data.tokenizer.base import Tokenizer
from flm_megatron.data.tokenizer.files import TokenizerFiles
from flm_megatron.errors import DamagedError, RequestError, reason


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Description:
    """What FILE.json says: the regular expression that cuts text, special tokens by id, and the roles of three."""

    pattern: str
    special_tokens: dict[str, Annotated[int, Ge(0)]] = field(default_factory=dict)
    eos: str = "<|endoftext|>"
    bos: str | None = None
    pad: str | None = None


LONGEST_RUN = 100_000
"""Characters in a row that are all spaces, or all not: beyond half a million of them tiktoken's stack overflows."""
_RUN = re.compile(r"\s+|\S+")
_DESCRIPTION = TypeAdapter(Description)


class TiktokenTokenizer(Tokenizer):
    """A rank file with its description."""

    def __init__(self, files: TokenizerFiles) -> None:
        """Load it, and the description beside it.

        Raises:
            RequestError: it has no description, or the description names no token that ends a document.
            DamagedError: one of them cannot be read.
        """
        super().__init__(files)
        self.description = _described(files)
        special, eos = dict(self.description.special_tokens), self.description.eos
        if eos not in special:
            raise RequestError(
                f"tokenizer {files.path} does not say which token ends a document: {files.place(files.description)} "
                f'has "eos": {eos!r}, which is not among its special_tokens'
            )
        taken = {rank for rank in self.ranks.values() if rank in special.values()}
        if taken:
            raise RequestError(
                f"{files.place(files.description)}: special token {min(taken)} has the id of a token of {files.path}: "
                f"give ids from {max(self.ranks.values()) + 1} on"
            )
        try:
            self._encoding = tiktoken.Encoding(
                files.name, pat_str=self.description.pattern, mergeable_ranks=dict(self.ranks), special_tokens=special
            )
        except (ValueError, KeyError, AssertionError, OverflowError) as error:  # of its core, which is not Python's
            raise DamagedError(
                f"{files.path} with {files.place(files.description)} is no tokenizer: {reason(error)}"
            ) from None

    @property
    def vocab_size(self) -> int:
        """See the base class."""
        return self._encoding.max_token_value + 1

    @property
    def eod(self) -> int:
        """See the base class."""
        return self._id(self.description.eos)

    @property
    def bos(self) -> int:
        """See the base class."""
        return self._id(self.description.bos)

    @property
    def pad(self) -> int:
        """See the base class."""
        return self._id(self.description.pad)

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """See the base class."""
        return self.description.special_tokens

    def encode(self, text: str) -> list[int]:
        """See the base class."""
        return [number for part in _without_long_runs(text) for number in self._encoding.encode_ordinary(part)]

    def encode_rendered(self, text: str) -> list[int]:
        """See the base class."""
        return self._encoding.encode(text, allowed_special="all")

    def decode(self, ids: Iterable[int]) -> str:
        """See the base class."""
        return b"".join(self._bytes.get(int(number), b"") for number in ids).decode("utf-8", "replace")

    @cached_property
    def _bytes(self) -> dict[int, bytes]:
        """The bytes of every id that is not special."""
        return {rank: token for token, rank in self.ranks.items()}

    @cached_property
    def ranks(self) -> Mapping[bytes, int]:
        """Ids of the byte strings that the file lists."""
        return _ranks(self.files)

    def _id(self, name: str | None) -> int:
        return -1 if name is None else self.description.special_tokens.get(name, -1)


def _without_long_runs(text: str) -> Iterator[str]:
    """`text` in pieces, cut only within runs that are longer than LONGEST_RUN, as Llama 3's own program does."""
    start, block = 0, LONGEST_RUN // 2
    blocks = (text[at : at + block] for at in range(0, len(text) - block, block) if len(text) > LONGEST_RUN)
    if any(part.isspace() or len(part.split(maxsplit=1)[0]) == block for part in blocks):
        for run in _RUN.finditer(text):
            for cut in range(run.start() + LONGEST_RUN, run.end(), LONGEST_RUN):
                yield text[start:cut]
                start = cut
    yield text[start:]


def _described(files: TokenizerFiles) -> Description:
    """What FILE.json says of a rank file."""
    place = files.place(files.description)
    if files.beside(files.description) is None:
        raise RequestError(
            f"tokenizer {files.path} is a tiktoken rank file, which holds neither the pattern that cuts text nor the "
            f'special tokens: write {place} as {{"pattern": "...", "special_tokens": {{"NAME": ID}}, "eos": "NAME"}}, '
            "or give the tokenizer.json of the model"
        )
    try:
        return _DESCRIPTION.validate_python(files.json_beside(files.description))
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        raise DamagedError(f"{place} does not describe a tiktoken file: {wrong}") from None


def _ranks(files: TokenizerFiles) -> dict[bytes, int]:
    try:
        pairs = (line.split() for line in files.data.splitlines() if line)
        return {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except ValueError as error:
        raise DamagedError(f"{files.path} is not a tiktoken rank file: {error}") from None
