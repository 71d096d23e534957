"""Opens tokenizers of any kind: which it is follows from the file's content."""

from __future__ import annotations

from flm_megatron.data.tokenizer.base import Tokenizer
from flm_megatron.data.tokenizer.files import TokenizerFiles
from flm_megatron.errors import FlmError
from flm_megatron.paths import FilePath


def open_tokenizer(path: FilePath) -> Tokenizer:
    """Open the tokenizer at `path`: a SentencePiece model, a `tokenizer.json`, a tiktoken rank file, or a folder that
    holds one of them; on this machine or at a URL.

    Raises:
        RequestError: it is not there, or lacks what a tokenizer needs here: an id that ends documents; of a tiktoken
            file its pattern.
        DamagedError: it is of none of these kinds.
    """
    files = TokenizerFiles(path)
    if files.kind == "hugging_face":
        from flm_megatron.data.tokenizer.hugging_face import HuggingFaceTokenizer

        return HuggingFaceTokenizer(files)
    if files.kind == "tiktoken":
        from flm_megatron.data.tokenizer.tiktoken import TiktokenTokenizer

        return TiktokenTokenizer(files)
    from flm_megatron.data.tokenizer.sentencepiece import SentencePieceTokenizer

    return SentencePieceTokenizer(files)


def tokenizer_fingerprint(path: FilePath) -> str | None:
    """The `fingerprint` of the tokenizer at `path`; none if none is there or it cannot be read."""
    try:
        return TokenizerFiles(path).fingerprint
    except (OSError, FlmError):
        return None
