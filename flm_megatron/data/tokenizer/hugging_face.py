"""`tokenizer.json` files, through the library `tokenizers`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from functools import cached_property

import tokenizers

from flm_megatron.data.tokenizer.base import Tokenizer
from flm_megatron.data.tokenizer.files import TokenizerFiles
from flm_megatron.data.tokenizer.neighbours import CONFIG, read_neighbours
from flm_megatron.errors import DamagedError, RequestError

# Work is shared among processes here; threads of this library would warn of each fork.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
"""Names of the token that ends a document, where nothing beside the file says it, in the order of trying."""
PADS = ("<|pad|>", "<pad>")
"""Names of the token that pads, likewise."""
BEGINNINGS = ("<|begin_of_text|>", "<s>", "<bos>")
"""Names of the token that begins a text, likewise."""


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json`; which token ends a document, and the chat template, stand in the files beside it."""

    def __init__(self, files: TokenizerFiles) -> None:
        """Load it.

        Raises:
            RequestError: nothing says which token ends a document.
            DamagedError: it is not a tokenizer, or a file beside it is not JSON.
        """
        super().__init__(files)
        self._tokenizer = _loaded(files)
        # As `split_special_tokens` of transformers: names of special tokens in a text are text.
        self._tokenizer.encode_special_tokens = True
        self._ids = self._tokenizer.get_vocab(with_added_tokens=True)
        beside = read_neighbours(files)
        guessed = {role: self._first(names) for role, names in (("eos", ENDS), ("pad", PADS), ("bos", BEGINNINGS))}
        self._special = {
            **{role: number for role, number in guessed.items() if number is not None},
            **beside.ids(self._ids, files),
        }
        self._ends = frozenset(beside.ends)
        if "eos" not in self._special:
            raise RequestError(
                f"tokenizer {files.path} does not say which token ends a document: write it into "
                f'{files.place(CONFIG)} as {{"eos_token": "NAME"}}'
            )

    def _first(self, names: Iterable[str]) -> int | None:
        return next((self._ids[name] for name in names if name in self._ids), None)

    @cached_property
    def vocab_size(self) -> int:
        """See the base class."""
        return max(self._ids.values()) + 1

    @property
    def eod(self) -> int:
        """See the base class."""
        return self._special["eos"]

    @property
    def bos(self) -> int:
        """See the base class."""
        return self._special.get("bos", -1)

    @property
    def pad(self) -> int:
        """See the base class."""
        return self._special.get("pad", -1)

    @property
    def ends(self) -> frozenset[int]:
        """See the base class."""
        return self._ends | {self.eod}

    @cached_property
    def special_tokens(self) -> Mapping[str, int]:
        """See the base class."""
        added = self._tokenizer.get_added_tokens_decoder()
        return {token.content: number for number, token in added.items() if token.special}

    def encode(self, text: str) -> list[int]:
        """See the base class."""
        return _ids(self._tokenizer, text)

    def encode_rendered(self, text: str) -> list[int]:
        """See the base class."""
        return _ids(self._rendering, text)

    @cached_property
    def _rendering(self) -> tokenizers.Tokenizer:
        """Another of the same, which knows special tokens by their names."""
        return _loaded(self.files)

    def decode(self, ids: Iterable[int]) -> str:
        """See the base class."""
        return self._tokenizer.decode([int(number) for number in ids], skip_special_tokens=True)


def _ids(tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
    """As `encode`, which takes twice as long, for it also finds where in the text each token stands."""
    return tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids


def _loaded(files: TokenizerFiles) -> tokenizers.Tokenizer:
    try:
        found = tokenizers.Tokenizer.from_buffer(files.data)
    except Exception as error:  # the library raises its base class
        raise DamagedError(f"{files.path} is not a tokenizer.json that `tokenizers` reads: {error}") from None
    found.no_padding()
    found.no_truncation()
    return found
