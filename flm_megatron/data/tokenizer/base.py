"""What every tokenizer can do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from functools import cached_property

from flm_megatron.data.tokenizer.files import Kind, TokenizerFiles
from flm_megatron.data.tokenizer.neighbours import read_template


class Tokenizer(ABC):
    """Text to ids and back. Text is text: `encode` adds no ids of its own, and the name of a special token in a
    document does not become this token.

    Opened by `open_tokenizer`.
    """

    def __init__(self, files: TokenizerFiles) -> None:
        """Of the tokenizer in `files`."""
        self.files, self.path = files, files.path

    @property
    def kind(self) -> Kind:
        """`sentencepiece`, `hugging_face` or `tiktoken`."""
        return self.files.kind

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the tokenizer's file, of a tiktoken file with its pattern and special tokens: its identity."""
        return self.files.fingerprint

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of ids: one more than the largest, added tokens included."""

    @property
    @abstractmethod
    def eod(self) -> int:
        """Id that ends a document (the tokenizer's eos)."""

    @property
    @abstractmethod
    def bos(self) -> int:
        """Id of the beginning of a text; -1 if there is none. Never added by `encode`."""

    @property
    @abstractmethod
    def pad(self) -> int:
        """Id of padding; -1 if there is none."""

    @property
    def ends(self) -> frozenset[int]:
        """Ids with which a model may end what it generates: `eod`, and those of a `generation_config.json`."""
        return frozenset({self.eod})

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """Ids of the tokens that chat templates write by name, such as `<|im_start|>`."""
        return {}

    @cached_property
    def chat_template(self) -> str | None:
        """The Jinja template beside the tokenizer; none if there is none. Raises DamagedError if it cannot be read."""
        return read_template(self.files)

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without bos or eos. The name of a special token in it is text like any other."""

    def encode_rendered(self, text: str) -> list[int]:
        """Ids of a text that a chat template wrote: names of special tokens are these tokens."""
        return self.encode(text)

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; special tokens give nothing, nor do ids that no token has."""

    def gives_back(self, text: str) -> bool:
        """Whether `text` survives: tokenizers that normalise, or have no ids for some characters, lose some of it."""
        return self.decode(self.encode(text)) == text
