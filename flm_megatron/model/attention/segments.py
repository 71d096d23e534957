"""Causal attention within the segments that share a sequence, such as packed conversations, without a mask.

On a GPU all segments are one call of torch's variable-length attention, where torch has it. Elsewhere each segment is a
call of torch's causal attention. Neither computes scores between segments.
"""

from __future__ import annotations

import math
from functools import cache, lru_cache, partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from flm_megatron.config.schema import ModelConfig
from flm_megatron.device import current
from flm_megatron.errors import reason

PROBED_SEQUENCE, PROBED_ENDS = 32, [[7, 32, 32], [37, 50, 64]]
PROBE_TOLERANCE = 0.05
"""Values of the probe are at most 1, its gradients about as large."""


def segment_ends(segments: Tensor) -> Tensor:
    """Where segments end [samples, most segments of a sample] int32, counted over the tokens of all samples.

    `segments` [samples, sequence] int64 on the host numbers the segment of each position; one is a run of equal
    numbers. Samples with fewer than the most have empty ones at their end. A device without values takes one segment a
    sample, which is the most that attention can have to do.
    """
    samples, sequence = segments.shape
    offsets = torch.arange(samples, dtype=torch.int32).unsqueeze(1) * sequence
    if not current().has_values:
        return offsets + sequence
    last = F.pad(segments[:, 1:] != segments[:, :-1], (0, 1), value=True)
    ends = pad_sequence([row.nonzero().flatten() + 1 for row in last], batch_first=True, padding_value=sequence)
    return ends.int() + offsets


def attend_within(query: Tensor, key: Tensor, value: Tensor, ends: Tensor, scale: float | None) -> Tensor:
    """Attention output [sequence, samples x groups, heads x channels].

    `query` is [sequence, samples x groups, heads, channels], a sample's groups side by side; `key` and `value` have
    query groups in place of heads. `ends` is of `segment_ends`, on their device.
    """
    grouped = query.size(2) != key.size(2)
    if query.device.type == "cpu" or obstacle(query.device, query.dtype, query.size(3), grouped):
        return _one_after_another(query, key, value, ends, scale)
    return _in_one_call(query, key, value, ends, scale)


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


@cache
def obstacle(device: torch.device, dtype: torch.dtype, channels: int, grouped: bool) -> str | None:
    """Why torch's variable-length attention cannot be used on `device`; none if it can.

    Tried once per process, forward and backward, against one segment after another.
    """
    results = []
    for attend in (_one_after_another, _in_one_call):
        query, key, value = (
            _waves(frequency, heads, channels, device, dtype)
            for frequency, heads in ((0.7, 1 + grouped), (1.3, 1), (2.9, 1))
        )
        ends = torch.tensor(PROBED_ENDS, dtype=torch.int32, device=device)
        try:
            with torch.enable_grad():
                output = attend(query, key, value, ends, None)
            results.append([output.detach(), *torch.autograd.grad(output.sum(), (query, key, value))])
        except (ImportError, TypeError, ValueError, RuntimeError) as error:
            return reason(error)
    furthest = max(float((one - other).abs().max()) for one, other in zip(*results, strict=True))
    return None if furthest < PROBE_TOLERANCE else f"its results are {furthest:.3g} away"


def packing_notice(model: ModelConfig, dtype: torch.dtype) -> str | None:
    """One line for the log where a GPU attends to one segment after another; none on a CPU, which always does."""
    device = current().torch_device
    if device.type == "cpu":
        return None
    lacking = obstacle(device, dtype, model.kv_channels, model.query_groups != model.num_attention_heads)
    if lacking is None:
        return None
    return (
        f"packed conversations are attended to one after another: torch {torch.__version__} has no variable-length "
        f"attention for {model.kv_channels} channels of {str(dtype).removeprefix('torch.')} here ({lacking})"
    )


def _waves(frequency: float, heads: int, channels: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Values for the probe, without the generator of random numbers."""
    shape = (PROBED_SEQUENCE, len(PROBED_ENDS), heads, channels)
    values = torch.arange(math.prod(shape), dtype=torch.float32, device=device).mul_(frequency).sin_()
    return values.view(shape).to(dtype).requires_grad_()


def _in_one_call(query: Tensor, key: Tensor, value: Tensor, ends: Tensor, scale: float | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # its window_size is from torch 2.11 on

    (sequence, folded), samples = query.shape[:2], len(ends)
    # [tokens of all samples, heads of all groups, channels]; with one sample and no shared keys nothing is copied.
    query, key, value = (
        x.unflatten(1, (samples, -1)).transpose(0, 1).flatten(0, 1).flatten(1, 2) for x in (query, key, value)
    )
    bounds = F.pad(ends.flatten(), (1, 0))
    attend = varlen_attn if query.size(1) == key.size(1) else partial(varlen_attn, enable_gqa=True)  # from 2.12 on
    output = attend(query, key, value, bounds, bounds, sequence, sequence, scale=scale, window_size=(-1, 0))
    assert isinstance(output, Tensor)
    return output.view(samples, sequence, folded // samples, -1).transpose(0, 1).contiguous().view(sequence, folded, -1)


def _one_after_another(query: Tensor, key: Tensor, value: Tensor, ends: Tensor, scale: float | None) -> Tensor:
    sequence, groups = query.size(0), query.size(1) // len(ends)
    samples = []
    for number, row in enumerate(_on_host(ends)):
        here = slice(number * groups, (number + 1) * groups)
        pieces = [
            scaled_dot_product(query[start:end, here], key[start:end, here], value[start:end, here], scale)
            for start, end in pairwise([0, *(end - number * sequence for end in row)])
            if end > start
        ]
        samples.append(torch.cat(pieces))
    return torch.cat(samples, dim=1).flatten(2)


@lru_cache(maxsize=2)
def _on_host(ends: Tensor) -> list[list[int]]:
    """The numbers, read once for all layers."""
    rows: list[list[int]] = ends.tolist()
    return rows
