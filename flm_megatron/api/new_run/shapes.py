"""The shape of a model of a size, in the proportions of published decoders."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

from flm_megatron.config.schema import ModelConfig
from flm_megatron.errors import RequestError
from flm_megatron.model.parameters import parameter_count

UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
SMALLEST, LARGEST = 10**5, 2 * 10**12
RATES = ((1.25e8, 6e-4), (3.5e8, 3e-4), (1.3e9, 2e-4), (6.7e9, 1.2e-4), (1.75e11, 6e-5))
"""Learning rates by parameters, of GPT-3 (arXiv 2005.14165, table 2.1)."""
LARGEST_RATE = 3e-3


def parse_size(text: str) -> int | None:
    """Parameters of a size such as 125M or 7B; none if it is none."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?)([KMBT]?)", text.strip().upper(), flags=re.ASCII)
    number = int(float(match[1]) * UNITS[match[2]]) if match else 0
    return number or None


def shape_of(size: int, vocab_size: int) -> ModelConfig:
    """A decoder of about `size` parameters: width 48 to 160 times its layers, heads of 64 or 128, SwiGLU of 8/3 width.

    Raises:
        RequestError: the size is smaller or larger than decoders are, or the vocabulary alone has more parameters.
    """
    if not SMALLEST <= size <= LARGEST:
        raise RequestError(f"model: {size:,} parameters are outside of {SMALLEST:,} to {LARGEST:,}")
    found = min(_shapes(size, vocab_size), key=lambda model: _misfit(model, size), default=None)
    if found is None:
        raise RequestError(f"model: a vocabulary of {vocab_size:,} leaves nothing of {size:,} parameters for layers")
    return found


def _shapes(size: int, vocab_size: int) -> Iterator[ModelConfig]:
    head = 128 if size >= 10**9 else 64 if size >= 5 * 10**6 else 16
    hidden = head
    while 2 * hidden * vocab_size < size and hidden <= 2**15:
        layers = (size - 2 * hidden * vocab_size) / (12 * hidden**2)
        model = ModelConfig(
            hidden_size=hidden,
            ffn_hidden_size=math.ceil(8 * hidden / 3 / head) * head,
            num_attention_heads=hidden // head,
            vocab_size=vocab_size,
        )
        for count in {max(1, math.floor(layers)), math.ceil(layers)}:
            if count <= 512:
                yield replace(model, num_layers=count)
        hidden += head


def _misfit(model: ModelConfig, size: int) -> float:
    """How far a shape is from the size, and from a width of about 96 times its layers."""
    usual = 96 if size >= 10**8 else 48
    aspect = abs(math.log(model.hidden_size / model.num_layers / usual))
    return 8 * abs(math.log(parameter_count(model) / size)) + aspect


def usual_rate(parameters: int) -> float:
    """A peak learning rate for a model of that many parameters, interpolated in GPT-3's table."""
    points = [(math.log(size), math.log(rate)) for size, rate in RATES]
    at = math.log(parameters)
    first = points[0]
    if at <= first[0]:  # smaller models take more, as 1 / sqrt(parameters)
        return min(LARGEST_RATE, math.exp(first[1] + (first[0] - at) / 2))
    for low, high in pairwise(points):
        if at <= high[0]:
            share = (at - low[0]) / (high[0] - low[0])
            return math.exp(low[1] + share * (high[1] - low[1]))
    return RATES[-1][1]
