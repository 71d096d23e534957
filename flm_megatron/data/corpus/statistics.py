"""Unigram entropy of a dataset: the loss of a model that knows only how frequent each id is."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy

from flm_megatron.data.corpus.description import at_hand, read_description
from flm_megatron.data.corpus.index_file import open_any_index
from flm_megatron.errors import RequestError
from flm_megatron.paths import FilePath

CHUNK = 1 << 24


@dataclass(frozen=True)
class UnigramEntropy:
    """Cross entropy of validation ids under training frequencies."""

    nats_per_token: float
    bits_per_byte: float


def unigram_entropy(train: FilePath, validation: FilePath) -> UnigramEntropy:
    """Mean -ln p(id) over the ids of the dataset `validation`, p being the frequencies in the dataset `train`.

    One is added to every count, so that ids which training never saw have a probability. Bits per byte are
    nats per token x tokens / (ln 2 x UTF-8 bytes); end-of-document ids count as tokens without bytes.

    Raises:
        RequestError: a dataset is missing, or the two were made with different tokenizers.
        DamagedError: files do not agree with what was written.
    """
    descriptions = [read_description(prefix) for prefix in (train, validation)]
    if descriptions[0].tokenizer != descriptions[1].tokenizer:
        raise RequestError(f"datasets {train} and {validation} were made with different tokenizers")
    counts = [_counts(prefix, descriptions[0].vocab_size) for prefix in (train, validation)]
    smoothed = counts[0] + 1.0
    nats = -float(numpy.dot(counts[1], numpy.log(smoothed / smoothed.sum())))
    tokens, text_bytes = descriptions[1].tokens, descriptions[1].text_bytes
    return UnigramEntropy(nats / tokens, nats / (math.log(2) * text_bytes))


def _counts(prefix: FilePath, vocab_size: int) -> numpy.ndarray:
    """Frequency of each id in a dataset, int64 [vocab_size]."""
    ids = numpy.memmap(at_hand(prefix, "bin"), dtype=open_any_index(at_hand(prefix, "idx")).dtype, mode="r")
    counts = numpy.zeros(vocab_size, dtype=numpy.int64)
    for start in range(0, len(ids), CHUNK):
        counts += numpy.bincount(ids[start : start + CHUNK], minlength=vocab_size)
    return counts
