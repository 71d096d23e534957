"""Tokenizers of three kinds behind one interface: SentencePiece, Hugging Face's `tokenizer.json`, tiktoken's ranks.

`open_tokenizer` opens any of them, `train_tokenizer` makes one.
"""

from flm_megatron.data.tokenizer.base import Tokenizer
from flm_megatron.data.tokenizer.files import tokenizer_exists, tokenizer_in
from flm_megatron.data.tokenizer.opening import open_tokenizer, tokenizer_fingerprint
from flm_megatron.data.tokenizer.train import train_tokenizer

__all__ = [
    "Tokenizer",
    "open_tokenizer",
    "tokenizer_exists",
    "tokenizer_fingerprint",
    "tokenizer_in",
    "train_tokenizer",
]
