"""Core attention on torch's scaled dot product, which avoids building the matrix of scores where it can."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flm_megatron.model.attention.cache import KeyValueCache
from flm_megatron.model.attention.scaled_dot_product import scaled_dot_product
from flm_megatron.model.attention.segments import attend_within
from flm_megatron.model.attention.window import attend_in_window
from flm_megatron.model.engine_config import EngineConfig

XPOS_SMOOTHING = 0.4


class CoreAttention(nn.Module):
    """Causal attention with grouped queries; replaces megatron-core's DotProductAttention.

    The scale is 1/sqrt(channels) unless `softmax_scale` is given; with `sliding_window` positions see that many of the
    last ones, themselves among them. Heads may be split over tensor-parallel ranks: each rank passes its own.
    """

    def __init__(
        self,
        config: EngineConfig,
        layer_number: int,
        attn_mask_type: object,
        attention_type: str,
        softmax_scale: float | None = None,
        **unused: object,
    ) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale
        self.layer_number = layer_number
        self.cache: KeyValueCache | None = None
        self.xpos_scale_base = config.xpos_scale_base
        self.window = config.sliding_window

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: object = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: object = None,
    ) -> Tensor:
        """Attention output [sequence, batch, heads x channels].

        `query` is [sequence, batch, heads, channels], `key` and `value` have query groups in place of heads. Position i
        sees positions up to i, except where `attention_mask` [batch or 1, 1, sequence, keys] is true. If it has two
        axes it is of `segments.segment_ends`, and positions see those of their own segment. With a cache the keys are
        those of all positions so far, and the queries belong to the last ones.
        """
        if self.cache is not None:
            key, value = self.cache.append(self.layer_number, key, value)
        queries, keys = query.size(0), key.size(0)
        if self.xpos_scale_base is not None:
            scales = _xpos_scales(keys, query.size(-1), self.xpos_scale_base, query.device)
            query = (query * scales[keys - queries :]).to(query.dtype)
            key = (key / scales).to(key.dtype)
        window = self.window if self.window is not None and self.window < keys else None
        if attention_mask is not None and attention_mask.dim() == 2:
            in_one_call = window is not None and queries == keys and query.device.type != "cpu"
            if attention_mask.size(1) > 1 or in_one_call:
                return attend_within(query, key, value, attention_mask, self.softmax_scale, window)
            attention_mask = None  # one segment is the whole sequence
        if window:
            return attend_in_window(query, key, value, self.softmax_scale, window, attention_mask).flatten(2)
        # torch's own causal mask counts from the first key, so it serves only where queries and keys are as many.
        plain = attention_mask is None and queries == keys
        allowed = None if plain else _allowed(attention_mask, queries, keys, query.device)
        return scaled_dot_product(query, key, value, self.softmax_scale, allowed).flatten(2)


def _allowed(attention_mask: Tensor | None, queries: int, keys: int, device: torch.device) -> Tensor:
    """True where a query may look; the queries are the last `queries` of `keys` positions."""
    causal = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    return causal if attention_mask is None else causal & ~attention_mask


def _xpos_scales(sequence: int, channels: int, scale_base: float, device: torch.device) -> Tensor:
    """Factors [sequence, 1, 1, channels] in fp32 of xPos, whose scores decay with distance (arXiv 2212.10554).

    Queries are multiplied by them after rotation, keys divided. Channel pair i (channels i and i + channels/2) has
    zeta_i = (2i/channels + 0.4) / 1.4, raised to the power n / scale_base at position n. Scores depend on
    zeta_i^((n - m) / scale_base) only, so positions are counted from the middle of the sequence, where factors stay
    nearest 1.
    """
    pairs = torch.arange(0, channels, 2, dtype=torch.float32, device=device)
    zeta = (pairs / channels + XPOS_SMOOTHING) / (1 + XPOS_SMOOTHING)
    positions = torch.arange(sequence, dtype=torch.float32, device=device) - sequence // 2
    factors = zeta ** (positions / scale_base).unsqueeze(1)
    return torch.cat([factors, factors], dim=-1)[:, None, None, :]
