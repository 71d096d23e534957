"""How the next token is chosen from logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flm_megatron.errors import RequestError


@dataclass(frozen=True)
class SamplingSettings:
    """A temperature of 0 is greedy; a `top_k` of 0, a `top_p` of 1 and a `repetition_penalty` of 1 do nothing."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise RequestError for a value out of range."""
        for name, good, range_ in (
            ("temperature", self.temperature >= 0, "0 (greedy) or above"),
            ("top-k", self.top_k >= 0, "0 (off) or above"),
            ("top-p", 0 < self.top_p <= 1, "above 0 and at most 1 (off)"),
            ("repetition penalty", self.repetition_penalty > 0, "above 0, 1 being off"),
        ):
            if not good:
                raise RequestError(f"{name} {getattr(self, name.replace('-', '_').replace(' ', '_'))}: it is {range_}")


class Sampler:
    """Chooses one sequence's tokens; draws from its own seeded generator, so that no batch or layout matters."""

    def __init__(self, settings: SamplingSettings, index: int = 0) -> None:
        self.settings = settings
        self._generator = torch.Generator().manual_seed((settings.seed * 1_000_003 + index) % 2**63)

    def choose(self, logits: Tensor, seen: Tensor) -> int:
        """The next id, from fp32 logits [vocabulary] and the ids so far [any], both on one device."""
        settings = self.settings
        if settings.repetition_penalty != 1:
            logits = penalised(logits, seen, settings.repetition_penalty)
        if settings.temperature == 0:
            return int(logits.argmax())
        logits = logits / settings.temperature
        if settings.top_k:
            logits = top_k(logits, settings.top_k)
        if settings.top_p < 1:
            logits = top_p(logits, settings.top_p)
        return int(torch.multinomial(logits.softmax(-1).cpu(), 1, generator=self._generator))


def penalised(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits of ids already seen divided by the penalty, or multiplied where they are below zero (CTRL, 1909.05858)."""
    ids = seen.unique()
    values = logits[ids]
    return logits.index_put((ids,), torch.where(values < 0, values * penalty, values / penalty))


def top_k(logits: Tensor, k: int) -> Tensor:
    """Logits [vocabulary] with all but the k largest at -inf."""
    least = logits.topk(min(k, logits.numel())).values[-1]
    return logits.masked_fill(logits < least, -torch.inf)


def top_p(logits: Tensor, p: float) -> Tensor:
    """Logits [vocabulary] with all but the likeliest ids that make up at least probability p at -inf."""
    values, order = logits.sort(descending=True)
    probabilities = values.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    return logits.index_fill(0, order[before >= p], -torch.inf)
