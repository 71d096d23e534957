"""Where masks lay before each path was masked once: a growth that began so goes on so.

Hidden channels are masked where they are written, where a norm reads them and in what it gives; of a feed-forward unit
gate and up; of a new query group queries, keys and values, of a new head in an old group its queries and its output.
Gradients of new weights open with powers of v up to the third.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from flm_megatron import kernels
from flm_megatron.model.masks.mask import Mask, RankMasks, this_rank
from flm_megatron.model.masks.sites import Undo, is_hidden_norm, mask_input, reachable_norm, run_instead
from flm_megatron.model.norms import LayerNorm, RMSNorm
from flm_megatron.model.parameters import Axis, ParameterSpec, Unit

Output = Tensor | tuple[Tensor | None, ...]


def mask_module(module: nn.Module, rows: Sequence[ParameterSpec], masks: RankMasks) -> Iterator[Undo]:
    """Put masks on one module, as `sites.mask_module`."""
    for spec in rows:
        if masks.plan.hidden is not None and is_hidden_norm(spec):
            norm = reachable_norm(module)
            yield run_instead(norm, _MaskedNorm(norm, masks.hidden()))
        if spec.kind in ("matrix", "embedding") and spec.value == "weight":
            for mask in _of_outputs(spec, masks):
                yield module.register_forward_hook(partial(_hide_output, mask)).remove
            if masks.plan.heads is not None and spec.find(Unit.HEAD, "in") is not None:
                yield mask_input(module, masks.get("mixed", partial(_old_mixed, masks)))


def _of_outputs(spec: ParameterSpec, masks: RankMasks) -> Iterator[Mask]:
    """Masks on what a matrix gives."""
    plan = masks.plan
    for axis in spec.axes:
        if plan.hidden is not None and (axis.unit, axis.side) == (Unit.HIDDEN, "out"):
            yield masks.hidden()
        if plan.ffn is not None and (axis.unit, axis.side) == (Unit.FFN, "out"):
            yield masks.get(axis, partial(_old_unit_rows, masks, axis))
        if plan.heads is not None and (axis.unit, axis.side) == (Unit.HEAD, "out"):
            yield masks.get(axis, partial(_old_head_rows, masks, axis))


def _hide_output(mask: Mask, _: nn.Module, args: object, output: Output) -> Output:
    """Mask a module's output, and the bias it may return beside it."""
    if isinstance(output, tuple):
        return tuple(None if part is None else mask.hide(part) for part in output)
    return mask.hide(output)


def _old_unit_rows(masks: RankMasks, axis: Axis) -> Tensor:
    """Rows of the first feed-forward matrix: gate and up, or one row a unit."""
    return this_rank(masks.old_units()).repeat(len(axis.bands))


def _old_head_rows(masks: RankMasks, axis: Axis) -> Tensor:
    """Rows of the query-key-value matrix: per group its queries, key and value."""
    queries, groups = masks.old_heads()
    bands = [groups if band.name in ("key", "value") else queries for band in axis.bands]
    return masks.channels(torch.cat(bands, 1))


def _old_mixed(masks: RankMasks) -> Tensor:
    """Channels that the projection reads, but for new groups, whose values are masked already.

    A new query head of an old group reads values that are not masked, so its output has to be.
    """
    queries, groups = masks.old_heads()
    return masks.channels(queries | ~groups)


class _MaskedNorm:
    """The forward pass of a norm over masked channels: sums run over x m, and sum(m) is the number of channels."""

    def __init__(self, norm: RMSNorm | LayerNorm, mask: Mask) -> None:
        self.norm, self.mask = norm, mask

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Normalise x [sequence, batch, hidden]: x m rsqrt(sum((x m)^2) / sum(m) + eps) w m (LayerNorm: x - mean).

        RMSNorm takes a residual too, and returns the sum of both beside its norm.
        """
        m, norm = self.mask.values, self.norm
        if isinstance(norm, RMSNorm):
            summed = x if residual is None else x + residual
            root = m.sqrt()  # the kernel's sum(m z^2) is that of (x m)^2 for z = x root
            normed = kernels.rms_norm(summed * root.to(x.dtype), norm.weight * root, norm.eps, m)
            return normed if residual is None else (normed, summed)
        share = m.mean()
        wide = x.float()
        wide = (wide - (wide * m).mean(-1, keepdim=True) / share) * m
        out = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) / share + norm.eps) * norm.weight
        return ((out + norm.bias) * m).to(x.dtype)
