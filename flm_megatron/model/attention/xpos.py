"""xPos: rotary positions whose scores decay with distance (Sun et al., arXiv 2212.10554)."""

from __future__ import annotations

import torch
from torch import Tensor

SMOOTHING = 0.4


def xpos_scales(sequence: int, channels: int, scale_base: float, device: torch.device) -> Tensor:
    """Factors [sequence, 1, 1, channels] in fp32: queries are multiplied by them after rotation, keys divided.

    Channel pair i (channels i and i + channels/2) has zeta_i = (2i/channels + 0.4) / 1.4, raised to the power
    n / scale_base at position n. Scores depend on zeta_i^((n - m) / scale_base) only, so positions are counted
    from the middle of the sequence, where factors stay nearest 1.
    """
    pairs = torch.arange(0, channels, 2, dtype=torch.float32, device=device)
    zeta = (pairs / channels + SMOOTHING) / (1 + SMOOTHING)
    positions = torch.arange(sequence, dtype=torch.float32, device=device) - sequence // 2
    factors = zeta ** (positions / scale_base).unsqueeze(1)
    return torch.cat([factors, factors], dim=-1)[:, None, None, :]
