"""Causal attention within the segments that share a sequence, such as packed conversations, without a mask.

A sliding window hides more of each segment.

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
from flm_megatron.model.attention.scaled_dot_product import scaled_dot_product
from flm_megatron.model.attention.window import attend_in_window

PROBED_SEQUENCE, PROBED_ENDS = 32, [[7, 32, 32], [37, 50, 64]]
PROBED_WINDOW = 8
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


def whole_sequences(samples: int, sequence: int, device: torch.device) -> Tensor:
    """The ends [samples, 1] int32 of samples that are one segment each, as `segment_ends` gives them."""
    return (torch.arange(1, samples + 1, dtype=torch.int32, device=device) * sequence).unsqueeze(1)


def attend_within(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor, scale: float | None, window: int | None = None
) -> Tensor:
    """Attention output [sequence, samples x groups, heads x channels].

    `query` is [sequence, samples x groups, heads, channels], a sample's groups side by side; `key` and `value` have
    query groups in place of heads. `ends` is of `segment_ends`, on their device. With a `window` positions see that
    many of the last ones of their segment, themselves among them.
    """
    grouped = query.size(2) != key.size(2)
    if query.device.type == "cpu" or obstacle(query.device, query.dtype, query.size(3), grouped, bool(window)):
        return _one_after_another(query, key, value, ends, scale, window)
    return _in_one_call(query, key, value, ends, scale, window)


@cache
def obstacle(device: torch.device, dtype: torch.dtype, channels: int, grouped: bool, windowed: bool) -> str | None:
    """Why torch's variable-length attention cannot be used on `device`, `windowed` or not; none if it can.

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
                output = attend(query, key, value, ends, None, PROBED_WINDOW if windowed else None)
            results.append([output.detach(), *torch.autograd.grad(output.sum(), (query, key, value))])
        except (ImportError, TypeError, ValueError, RuntimeError) as error:
            return reason(error)
    furthest = max(float((one - other).abs().max()) for one, other in zip(*results, strict=True))
    return None if furthest < PROBE_TOLERANCE else f"its results are {furthest:.3g} away"


def packing_notice(model: ModelConfig, dtype: torch.dtype) -> str | None:
    """One line for the log where a GPU attends to one segment, or block of a sliding window, after another; none on a
    CPU, which always does."""
    device = current().torch_device
    if device.type == "cpu":
        return None
    grouped, windowed = model.query_groups != model.num_attention_heads, model.sliding_window is not None
    lacking = obstacle(device, dtype, model.kv_channels, grouped, windowed)
    if lacking is None:
        return None
    what = "blocks of a sliding window" if windowed else "packed conversations"
    return (
        f"{what} are attended to one after another: torch {torch.__version__} has no variable-length attention for "
        f"{model.kv_channels} channels of {str(dtype).removeprefix('torch.')} here ({lacking})"
    )


def _waves(frequency: float, heads: int, channels: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Values for the probe, without the generator of random numbers."""
    shape = (PROBED_SEQUENCE, len(PROBED_ENDS), heads, channels)
    values = torch.arange(math.prod(shape), dtype=torch.float32, device=device).mul_(frequency).sin_()
    return values.view(shape).to(dtype).requires_grad_()


def _in_one_call(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor, scale: float | None, window: int | None = None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # its window_size is from torch 2.11 on

    (sequence, folded), samples = query.shape[:2], len(ends)
    # [tokens of all samples, heads of all groups, channels]; with one sample and no shared keys nothing is copied.
    query, key, value = (
        x.unflatten(1, (samples, -1)).transpose(0, 1).flatten(0, 1).flatten(1, 2) for x in (query, key, value)
    )
    bounds = F.pad(ends.flatten(), (1, 0))
    attend = varlen_attn if query.size(1) == key.size(1) else partial(varlen_attn, enable_gqa=True)  # from 2.12 on
    seen = (window - 1 if window else -1, 0)
    output = attend(query, key, value, bounds, bounds, sequence, sequence, scale=scale, window_size=seen)
    assert isinstance(output, Tensor)
    return output.view(samples, sequence, folded // samples, -1).transpose(0, 1).contiguous().view(sequence, folded, -1)


def _one_after_another(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor, scale: float | None, window: int | None = None
) -> Tensor:
    sequence, groups = query.size(0), query.size(1) // len(ends)
    samples = []
    for number, row in enumerate(_on_host(ends)):
        here = slice(number * groups, (number + 1) * groups)
        pieces = [
            _attended(query[start:end, here], key[start:end, here], value[start:end, here], scale, window)
            for start, end in pairwise([0, *(end - number * sequence for end in row)])
            if end > start
        ]
        samples.append(torch.cat(pieces))
    return torch.cat(samples, dim=1).flatten(2)


def _attended(query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None) -> Tensor:
    """Causal attention of one segment."""
    if window is None or window >= key.size(0):
        return scaled_dot_product(query, key, value, scale)
    return attend_in_window(query, key, value, scale, window)


@lru_cache(maxsize=2)
def _on_host(ends: Tensor) -> list[list[int]]:
    """The numbers, read once for all layers."""
    rows: list[list[int]] = ends.tolist()
    return rows
