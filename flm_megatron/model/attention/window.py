"""Causal attention to the last positions alone (a sliding window), in blocks of queries with the keys they may see.

The same window as Mistral's (arXiv 2310.06825) in `transformers`: position i sees positions above i - window up to i.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from flm_megatron.device import current
from flm_megatron.model.attention.scaled_dot_product import scaled_dot_product

SMALLEST_BLOCK = 128
"""Queries attended to together where the window is smaller: many small calls take longer than the scores they spare."""


def attend_in_window(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int, hidden: Tensor | None = None
) -> Tensor:
    """Attention output [queries, batch, heads, channels] of the last `queries` of `keys` positions.

    `query` is [queries, batch, heads, channels], `key` and `value` have as many positions as there are keys; `hidden`
    [batch or 1, 1, queries, keys] is true where attention must not look besides. A device without values takes as many
    keys as the window has for all queries at once: that is what a GPU's one call of attention computes and keeps.
    """
    queries, keys = query.size(0), key.size(0)
    if not current().has_values:
        return scaled_dot_product(query, key[:window], value[:window], scale)
    outputs = []
    for start, end, first, last in _blocks(queries, keys, window):
        age = torch.arange(keys - queries + start, keys - queries + end, device=query.device).unsqueeze(1)
        age = age - torch.arange(first, last, device=query.device)
        allowed = (age >= 0) & (age < window)
        if hidden is not None:
            allowed = allowed & ~hidden[..., start:end, first:last]
        outputs.append(scaled_dot_product(query[start:end], key[first:last], value[first:last], scale, allowed))
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def _blocks(queries: int, keys: int, window: int) -> Iterator[tuple[int, int, int, int]]:
    """First query of a block, the one after its last, and the same of the keys that they may see."""
    offset, block = keys - queries, max(window, SMALLEST_BLOCK)
    for start in range(0, queries, block):
        end = min(start + block, queries)
        yield start, end, max(0, offset + start + 1 - window), offset + end
