"""How layers and vocabulary are spread over processes, from sizes alone."""

from __future__ import annotations

from flm_megatron.config.rules.pipeline import pipeline_split

__all__ = ["VOCABULARY_MULTIPLE", "padded_vocab_size", "pipeline_split"]

VOCABULARY_MULTIPLE = 128


def padded_vocab_size(vocab_size: int, tensor: int) -> int:
    """Vocabulary rounded up to a multiple of 128 times the tensor-parallel size, so that it splits evenly."""
    multiple = VOCABULARY_MULTIPLE * tensor
    return -(-vocab_size // multiple) * multiple
