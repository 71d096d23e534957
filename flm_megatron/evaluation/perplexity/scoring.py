"""How likely given continuations are, and whether greedy decoding would give them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flm_megatron.model.forward import Batch, Chunks, forward


@dataclass(frozen=True)
class ScoringRequest:
    """Ids, at least one of context, of which those from `start` on are scored."""

    index: int
    ids: Sequence[int]
    start: int


@dataclass(frozen=True)
class Likelihood:
    """Sum of natural log-probabilities of the scored ids, and whether each of them was the likeliest."""

    index: int
    log_likelihood: float
    greedy: bool


def score(chunks: Chunks, requests: Sequence[ScoringRequest]) -> list[Likelihood]:
    """Score a batch of requests; results at the end of the pipeline, nothing elsewhere."""
    length = max(len(request.ids) for request in requests) - 1
    tokens = torch.zeros(len(requests), length, dtype=torch.long)
    for row, request in enumerate(requests):
        tokens[row, : len(request.ids) - 1] = torch.tensor(request.ids[:-1])

    def finish(_: Batch, logits: Tensor) -> list[Likelihood]:
        """Likelihoods of all rows."""
        return [_likelihood(request, logits[row]) for row, request in enumerate(requests)]

    outputs = forward(chunks, [Batch(tokens)], 1, finish)
    return outputs[0] if outputs else []


def _likelihood(request: ScoringRequest, logits: Tensor) -> Likelihood:
    """From logits [sequence, vocabulary], which predict the ids from the second on."""
    targets = torch.tensor(request.ids[request.start :], device=logits.device)
    predictions = logits[request.start - 1 : len(request.ids) - 1].float()
    chosen = predictions.log_softmax(-1).gather(1, targets[:, None])
    greedy = bool((predictions.argmax(-1) == targets).all())
    return Likelihood(request.index, float(chosen.double().sum()), greedy)
