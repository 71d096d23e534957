"""SentencePiece models."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

import sentencepiece

from flm_megatron.data.tokenizer.base import Tokenizer
from flm_megatron.data.tokenizer.chunks import text_chunks
from flm_megatron.data.tokenizer.files import TokenizerFiles
from flm_megatron.errors import DamagedError, RequestError

# SentencePiece writes a space as this character, so the character itself has to go through its bytes.
SPACE_SYMBOL = "\u2581"
# Pieces of a text are found within chunks of about this many characters, which bounds time and memory.
CHUNK_CHARACTERS = 65536


class SentencePieceTokenizer(Tokenizer):
    """A trained SentencePiece model."""

    def __init__(self, files: TokenizerFiles) -> None:
        """Load it.

        Raises:
            RequestError: it has no id that ends a document.
            DamagedError: it is not a SentencePiece model.
        """
        super().__init__(files)
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=files.data or b"empty")
        except (RuntimeError, ValueError):  # its words are of its own source code
            raise DamagedError(f"{files.path} is not a SentencePiece model ({len(files.data):,} bytes)") from None
        if self._model.eos_id() < 0:
            raise RequestError(f"tokenizer {files.path} has no end-of-sequence id, which ends every document")

    @property
    def vocab_size(self) -> int:
        """See the base class."""
        return self._model.vocab_size()

    @property
    def eod(self) -> int:
        """See the base class."""
        return self._model.eos_id()

    @property
    def bos(self) -> int:
        """See the base class."""
        return self._model.bos_id()

    @property
    def pad(self) -> int:
        """See the base class."""
        return self._model.pad_id()

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
        for chunk in text_chunks(text, CHUNK_CHARACTERS):
            for number, part in enumerate(chunk.split(SPACE_SYMBOL)):
                ids += (self._space_symbol_ids if number else []) + self._model.encode(part)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; bos, eos and pad give nothing, nor do ids that the model does not have."""
        return self._model.decode([number for number in map(int, ids) if number < self.vocab_size])
