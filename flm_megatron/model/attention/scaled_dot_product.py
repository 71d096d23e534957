"""torch's scaled dot product attention in the layout of the engine's tensors."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def scaled_dot_product(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, allowed: Tensor | None = None
) -> Tensor:
    """torch's attention [sequence, batch, heads, channels], causal unless `allowed` says what queries may see.

    `query` is [sequence, batch, heads, channels], `key` and `value` have query groups in place of heads; `allowed`
    [batch or 1, 1, sequence, keys], or of the last two axes, is true where a query may look.
    """
    output = F.scaled_dot_product_attention(
        query.permute(1, 2, 0, 3),
        key.permute(1, 2, 0, 3),
        value.permute(1, 2, 0, 3),
        attn_mask=allowed,
        is_causal=allowed is None,
        scale=scale,
        enable_gqa=query.size(2) != key.size(2),
    )
    return output.permute(2, 0, 1, 3)
