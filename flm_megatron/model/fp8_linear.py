"""The engine's linear layers with their three matrix products in FP8, split over tensor-parallel ranks as before.

Weights, activations and gradients stay in the training precision and are cast for each product. With `tensorwise`
scaling the largest value is taken over the whole matrix, that is over all ranks that hold a shard of it, so that a
layout changes no scale; with `rowwise` scaling each shard of a split row has its own scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from flm_megatron.kernels import fp8
from flm_megatron.kernels.autograd import Context


def in_fp8(base: type, scaling: fp8.Scaling | None, column: bool) -> type:
    """The engine's (or our adapted) linear layer `base`, with products in FP8 unless `scaling` is none.

    With `column` its output is split over tensor-parallel ranks, else its input.
    """
    if scaling is None:
        return base
    return type(f"Fp8{base.__name__}", (_Fp8Products, base), {"scaling": scaling, "column": column})


class _Fp8Products:
    """Replaces the products in the engine's linear layers."""

    scaling: fp8.Scaling
    column: bool
    tp_group: dist.ProcessGroup

    def _forward_impl(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        **_: object,
    ) -> Tensor:
        """input weight^T + bias [sequence, batch, output shard], with the signature of the engine's functions."""
        how = _How(self.scaling, self.column, self.tp_group, sequence_parallel, allreduce_dgrad)
        output = _Fp8Linear.apply(input, weight, how)
        return output if bias is None else output + bias


@dataclass(frozen=True)
class _How:
    """Scaling, and which operands are split over the ranks of `group`: the output of a column-parallel layer, the
    input of a row-parallel one. Under sequence parallelism a column-parallel layer gathers its input first."""

    scaling: fp8.Scaling
    column: bool
    group: dist.ProcessGroup
    gather: bool
    reduce: bool

    def amaxes(self, *matrices: tuple[Tensor, bool]) -> list[Tensor | None]:
        """Largest values of matrices, those marked being shards; none where each row has its own scale."""
        if self.scaling == "rowwise":
            return [None] * len(matrices)
        found = torch.stack([fp8.largest(x) for x, _ in matrices])
        split = [is_shard for _, is_shard in matrices]
        if any(split) and self.group.size() > 1:
            # The others are the same on every rank.
            dist.all_reduce(found, dist.ReduceOp.MAX, group=self.group)
        return list(found.unbind())

    def product(self, a: fp8.Quantized, b: fp8.Quantized, dtype: torch.dtype, forward: bool = False) -> Tensor:
        """As torchao's recipes: GPUs are fast with row scales only if they accumulate fast."""
        return fp8.product(a, b, dtype, fast_accumulation=forward or self.scaling == "rowwise")


class _Context(Context, Protocol):
    how: _How


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, x: Tensor, weight: Tensor, how: _How) -> Tensor:
        """x weight^T [..., out], from x [..., in] and weight [out, in], gathered and cast to E4M3."""
        rows = _gather(x, how.group)[0] if how.gather else x
        amax_x, amax_weight = how.amaxes((rows, not how.column), (weight, True))
        out = how.product(
            fp8.quantize(rows.flatten(0, -2), fp8.E4M3, amax_x),
            fp8.quantize(weight, fp8.E4M3, amax_weight),
            x.dtype,
            True,
        )
        ctx.save_for_backward(x, weight, amax_x, amax_weight)
        ctx.how = how
        return out.view(*rows.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of input and weight; communication overlaps with the products, as in the engine's own layers."""
        x, weight, amax_x, amax_weight = ctx.saved_tensors
        how, learns, rows, gathered = ctx.how, ctx.needs_input_grad[1], x, None
        if how.gather and learns:
            rows, gathered = _gather(x, how.group, wait=False)
        upstream = grad.flatten(0, -2)
        (amax_grad,) = how.amaxes((upstream, how.column))
        dtype = fp8.GRADIENT_DTYPE[how.scaling]
        grad_x = how.product(
            fp8.quantize(upstream, dtype, amax_grad),
            fp8.quantize(weight, fp8.E4M3, amax_weight, transpose=True),
            x.dtype,
        )
        grad_x, reduced = _reduce(grad_x.view(*grad.shape[:-1], -1), x, how)
        grad_weight = None
        if learns:
            if gathered:
                gathered.wait()
            grad_weight = how.product(
                fp8.quantize(upstream, dtype, amax_grad, transpose=True),
                fp8.quantize(rows.flatten(0, -2), fp8.E4M3, amax_x, transpose=True),
                weight.dtype,
            )
        if reduced:
            reduced.wait()
        return grad_x, grad_weight, None


def _gather(x: Tensor, group: dist.ProcessGroup, wait: bool = True) -> tuple[Tensor, dist.Work | None]:
    """All shards of a sequence [sequence shard, batch, channels], and the handle to wait on if not `wait`."""
    whole = torch.empty(x.size(0) * group.size(), *x.shape[1:], dtype=x.dtype, device=x.device)
    return whole, dist.all_gather_into_tensor(whole, x.contiguous(), group=group, async_op=not wait)


def _reduce(grad: Tensor, x: Tensor, how: _How) -> tuple[Tensor, dist.Work | None]:
    """The gradient summed over ranks, in the shape of `x`, with the handle to wait on; unchanged if there is no sum."""
    if how.gather:
        shard = torch.empty_like(x, memory_format=torch.contiguous_format)
        return shard, dist.reduce_scatter_tensor(shard, grad, group=how.group, async_op=True)
    return grad, dist.all_reduce(grad, group=how.group, async_op=True) if how.reduce else None
