"""Bits per byte: how many bits a model needs for each UTF-8 byte of a text, whatever its tokenizer.

Bits per byte = total negative log-likelihood in nats / (ln 2 x UTF-8 bytes), by domain and weighted by the domains'
shares (Tele-FLM report, arXiv 2404.16645).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from flm_megatron.data.tokenizer import Tokenizer
from flm_megatron.device import current
from flm_megatron.engine import parallel_state
from flm_megatron.errors import RequestError
from flm_megatron.evaluation.perplexity.windows import sliding_windows, window_batch
from flm_megatron.model.forward import Batch, Chunks, forward, is_output_rank


@dataclass(frozen=True)
class DomainScore:
    """What a model spent on one domain's text: nats over `tokens` tokens that spell `text_bytes` bytes."""

    nats: float
    tokens: int
    text_bytes: int

    @property
    def bits_per_byte(self) -> float:
        """nats / (ln 2 x bytes)."""
        return self.nats / (math.log(2) * self.text_bytes)

    def __add__(self, other: DomainScore) -> DomainScore:
        return DomainScore(self.nats + other.nats, self.tokens + other.tokens, self.text_bytes + other.text_bytes)


@dataclass(frozen=True)
class WindowSettings:
    """Windows of `length` tokens that move by `stride`, `batch` of them in one forward pass."""

    length: int
    stride: int
    batch: int = 1


def score_documents(
    chunks: Chunks, tokenizer: Tokenizer, documents: Sequence[str], settings: WindowSettings
) -> DomainScore:
    """Score of a domain's documents, the same on every rank; data-parallel ranks share the windows.

    The end-of-document id comes before each document, as in training, so that its first token is predicted too.
    """
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    texts = [[tokenizer.eod, *tokenizer.encode(text)] for text in documents]
    windows = [
        (ids, window) for ids in texts for window in sliding_windows(len(ids) - 1, settings.length, settings.stride)
    ]
    length = max((window.end - window.start for _, window in windows), default=0)
    groups = [windows[start : start + settings.batch] for start in range(0, len(windows), settings.batch)][rank::size]
    batches = (window_batch(group, settings.batch, length) for group in groups)
    outputs = forward(chunks, batches, len(groups), _sum)
    sums = torch.zeros(2, dtype=torch.float64)
    if is_output_rank() and outputs:
        sums = torch.stack(outputs).sum(0)
    sums = sums.to(current().torch_device)
    dist.all_reduce(sums)
    nats, tokens = sums.tolist()
    return DomainScore(nats, int(tokens), sum(len(text.encode()) for text in documents))


def weighted(scores: Mapping[str, DomainScore], shares: Mapping[str, float]) -> float:
    """Mean of the domains' bits per byte, weighted by their shares (which need not add up to 1)."""
    return sum(scores[name].bits_per_byte * share for name, share in shares.items()) / sum(shares.values())


def check_shares(shares: Mapping[str, float], domains: Sequence[str]) -> None:
    """Raise RequestError unless every domain has a share, none below zero and not all of them zero."""
    if set(shares) != set(domains):
        raise RequestError(f"weights are for {', '.join(shares)}, texts for {', '.join(domains)}: name the same ones")
    if min(shares.values()) < 0 or sum(shares.values()) <= 0:
        raise RequestError(f"weights {', '.join(f'{share:g}' for share in shares.values())}: none may be below zero")


def _sum(batch: Batch, losses: Tensor) -> Tensor:
    assert batch.weights is not None
    weights = batch.weights.to(losses.device)
    return torch.stack([(losses.double() * weights).sum(), weights.sum()]).cpu()
