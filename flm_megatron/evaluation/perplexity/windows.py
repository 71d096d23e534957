"""Sliding windows over a long text, so that every token is predicted once and with context."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from flm_megatron.errors import RequestError
from flm_megatron.model.forward import Batch


@dataclass(frozen=True)
class Window:
    """Predictions `start` to `end` of a text; those before `scored` were counted in an earlier window."""

    start: int
    end: int
    scored: int


def sliding_windows(predictions: int, length: int, stride: int) -> Iterator[Window]:
    """Windows of up to `length` over `predictions`, each but the first scoring at most `stride` new ones.

    Every token scored after the first window has at least `length - stride` tokens of context.
    """
    end = 0
    while end < predictions:
        scored, end = end, min(length if end == 0 else end + stride, predictions)
        yield Window(max(0, end - length), end, scored)


def check_window(length: int, stride: int) -> None:
    """Raise RequestError unless windows of `length` can move by `stride`."""
    if length < 1 or not 1 <= stride <= length:
        raise RequestError(f"windows of {length} tokens cannot move by {stride}: the stride is from 1 to the length")


def window_batch(windows: Sequence[tuple[Sequence[int], Window]], rows: int, length: int) -> Batch:
    """Windows, each with the ids of its text (the context token first), as a batch of `rows` x `length`.

    What fills it up weighs nothing.
    """
    tokens = torch.zeros(rows, length, dtype=torch.long)
    labels = torch.zeros(rows, length, dtype=torch.long)
    weights = torch.zeros(rows, length, dtype=torch.float64)
    for row, (ids, window) in enumerate(windows):
        size = window.end - window.start
        tokens[row, :size] = torch.tensor(ids[window.start : window.end])
        labels[row, :size] = torch.tensor(ids[window.start + 1 : window.end + 1])
        weights[row, window.scored - window.start : size] = 1.0
    return Batch(tokens, labels, weights)
