"""Learned positions, which one each token has; and rotary frequencies, slowed down for longer sequences."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from flm_megatron.config.schema import RopeScaling


def positions_of(tokens: Tensor, attention_mask: Tensor | None, start: int) -> Tensor:
    """Positions [batch, sequence] int64 of `tokens` [batch, sequence], of which `start` others come before.

    Each is the number of earlier tokens that `attention_mask` lets it see, as in `TeleFLM.forward`: they begin anew
    after padding on the left, with each segment, and behind each mask of what came before.
    """
    batch, sequence = tokens.shape
    counted = torch.arange(start, start + sequence, device=tokens.device).expand(batch, sequence)
    if attention_mask is None:
        return counted
    if attention_mask.dim() == 2:
        return _within_segments(batch, sequence, attention_mask)
    future = torch.arange(start + sequence, device=tokens.device) > counted[0].unsqueeze(1)
    return (~(attention_mask[:, 0] | future)).sum(-1).sub(1).expand(batch, sequence)


def _within_segments(batch: int, sequence: int, ends: Tensor) -> Tensor:
    """Positions within segments; `ends` [batch, most segments] count over the tokens of all samples."""
    counted = torch.arange(batch * sequence, device=ends.device, dtype=ends.dtype)
    bounds = F.pad(ends.flatten(), (1, 0))
    begun = bounds[torch.searchsorted(bounds[1:], counted, right=True)]
    return (counted - begun).view(batch, sequence).long()


def scaled_frequencies(frequencies: Tensor, scaling: RopeScaling, theta: float) -> Tensor:
    """The frequencies [channels / 2] in radians a token, each between itself and itself over the factor.

    `frequencies` are those of the unscaled model, theta^(-2i / channels), channels being those that turn. Linear: Chen
    et al., arXiv 2306.15595; Llama 3's: arXiv 2407.21783; YaRN: arXiv 2309.00071.
    """
    if scaling.kind == "linear":
        kept = torch.zeros_like(frequencies)
    elif scaling.kind == "llama3":
        turns = scaling.original_length * frequencies / (2 * math.pi)
        kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    else:
        kept = _kept_by_yarn(frequencies, scaling, theta)
    kept = kept.clamp(0, 1)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies


def _kept_by_yarn(frequencies: Tensor, scaling: RopeScaling, theta: float) -> Tensor:
    """1 for fast pairs of channels, 0 for slow ones; in between it falls with the number of the pair."""
    channels = 2 * len(frequencies)

    def pair_of(turns: float) -> float:
        """The pair, counted with fractions, that turns as often within the original length."""
        return channels * math.log(scaling.original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first = max(math.floor(pair_of(scaling.beta_fast)), 0)
    last = min(math.ceil(pair_of(scaling.beta_slow)), channels - 1)
    pairs = torch.arange(len(frequencies), dtype=frequencies.dtype, device=frequencies.device)
    return 1 - (pairs - first) / (last - first if last != first else 0.001)
