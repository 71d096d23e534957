"""The engine's linear layers with their three matrix products in FP8, split over tensor-parallel ranks as before.

Weights, activations and gradients stay in the training precision and are cast for each product: weights once a step
(`weights_cast_once`), norms and activations that nothing else reads as they are computed (`casts_input`). With
`tensorwise` scaling the largest value is taken over the whole matrix, that is over all ranks that hold a shard of it,
so that a layout changes no scale; with `rowwise` scaling each shard of a split row has its own scale.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from flm_megatron.kernels import fp8
from flm_megatron.kernels.autograd import Context
from flm_megatron.kernels.unwritten import Gated, Normed, Operand, operand_of


def in_fp8(base: type, scaling: fp8.Scaling | None, column: bool) -> type:
    """The engine's (or our adapted) linear layer `base`, with products in FP8 unless `scaling` is none.

    With `column` its output is split over tensor-parallel ranks, else its input.
    """
    if scaling is None:
        return base
    return type(f"Fp8{base.__name__}", (_Fp8Products, base), {"scaling": scaling, "column": column})


def casts_input(layer: nn.Module) -> bool:
    """Whether a linear layer reads its input for nothing but its cast to FP8: adapters and growth masks read it as it
    is."""
    return isinstance(layer, _Fp8Products) and not hasattr(layer, "lora_a") and not hasattr(layer, "reads_masked")


class _Fp8Products:
    """Replaces the products in the engine's linear layers."""

    scaling: fp8.Scaling
    column: bool
    tp_group: dist.ProcessGroup
    weight_casts: _WeightCasts | None = None
    """Those of this step, while `weights_cast_once` runs."""
    _operand: Operand | None = None

    def forward(self, input_: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor | None]:
        """Output [sequence, batch, output shard or output], and the bias if it is not added; of an input that is not
        written, what it is made of is read."""
        self._operand = operand_of(input_)
        return super().forward(input_, *args, **kwargs)  # type: ignore[misc]

    def _forward_impl(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gradient_accumulation_fusion: bool,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        **_: object,
    ) -> Tensor:
        """input weight^T + bias [sequence, batch, output shard], with the signature of the engine's functions."""
        how = _How(
            self.scaling,
            self.column,
            self.tp_group,
            sequence_parallel,
            allreduce_dgrad,
            gradient_accumulation_fusion,
        )
        # What the engine does to the input in between has no values to do it to.
        operand, self._operand = self._operand, None
        casts = self.weight_casts or _WeightCasts(kept=False)
        output = _Fp8Linear.apply(input, weight, operand, how, casts)
        return output if bias is None else output + bias


class _WeightCasts:
    """The casts of a weight, made when they are first asked for and `kept`, or made anew each time."""

    def __init__(self, kept: bool) -> None:
        self.kept = kept
        self.amax: Tensor | None = None
        self._made: dict[bool, fp8.Quantized] = {}

    def largest(self, weight: Tensor) -> Tensor:
        """Largest value of this rank's shard; once `amax` is there, that of all shards."""
        return fp8.largest(weight) if self.amax is None else self.amax

    def cast(self, weight: Tensor, transpose: bool = False) -> fp8.Quantized:
        """The weight, or its transpose, with the scale that follows from `amax`."""
        found = self._made.get(transpose) or fp8.quantize(weight, fp8.E4M3, self.amax, transpose)
        if self.kept:
            self._made[transpose] = found
        return found


@contextmanager
def weights_cast_once(chunks: Sequence[nn.Module], micro_batches: int) -> Iterator[None]:
    """While the block runs no weight changes: each one in FP8 is cast by the first micro-batch that needs it.

    Its two casts, a byte for each value in each, stay until the end of the block. Of a single micro-batch there is
    nothing to keep.
    """
    layers = [module for chunk in chunks for module in chunk.modules() if isinstance(module, _Fp8Products)]
    if micro_batches > 1:
        for layer in layers:
            layer.weight_casts = _WeightCasts(kept=True)
    try:
        yield
    finally:
        for layer in layers:
            layer.weight_casts = None


@dataclass(frozen=True)
class _How:
    """Scaling, and which operands are split over the ranks of `group`: the output of a column-parallel layer, the
    input of a row-parallel one. Under sequence parallelism a column-parallel layer gathers its input first. The
    gradient of the weight is added to its buffer at once where that is asked for (`accumulate`)."""

    scaling: fp8.Scaling
    column: bool
    group: dist.ProcessGroup
    gather: bool
    reduce: bool
    accumulate: bool

    def agreed(self, *largest: tuple[Tensor, bool]) -> list[Tensor]:
        """Largest values of matrices, those marked being of shards, agreed upon by all ranks."""
        if any(is_shard for _, is_shard in largest) and self.group.size() > 1:
            # The others are the same on every rank.
            found = torch.stack([value for value, _ in largest])
            dist.all_reduce(found, dist.ReduceOp.MAX, group=self.group)
            return list(found.unbind())
        return [value for value, _ in largest]

    def product(self, a: fp8.Quantized, b: fp8.Quantized, dtype: torch.dtype, forward: bool = False) -> Tensor:
        """As torchao's recipes: GPUs are fast with row scales only if they accumulate fast."""
        return fp8.product(a, b, dtype, fast_accumulation=forward or self.scaling == "rowwise")

    def weight_gradient(self, weight: Tensor, grad: fp8.Quantized, rows: fp8.Quantized) -> Tensor | None:
        """grad rows^T, both [channels, tokens], for autograd; or added to the weight's buffer, and then a placeholder
        that nothing reads where the engine asks for one."""
        if not self.accumulate:
            return self.product(grad, rows, weight.dtype)
        # By rows, torch's product has results in bf16 alone on most GPUs.
        dtype = weight.dtype if self.scaling == "rowwise" else torch.float32
        fp8.add_product_(weight.main_grad, grad, rows, dtype, fast_accumulation=self.scaling == "rowwise")  # type: ignore[attr-defined]
        if not hasattr(weight, "grad_added_to_main_grad"):
            return None
        weight.grad_added_to_main_grad = True
        return torch.empty_like(weight)


class _Context(Context, Protocol):
    how: _How
    casts: _WeightCasts
    made_of: type[Gated] | type[Normed] | None


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, x: Tensor, weight: Tensor, operand: Operand, how: _How, casts: _WeightCasts) -> Tensor:
        """x weight^T [..., out], from x [..., in] and weight [out, in], cast to E4M3 and gathered. `operand` is what
        the rows of `x` are made of, or the rows."""
        amax_x = None
        if how.scaling == "tensorwise":
            largest = (fp8.largest(operand), how.gather or not how.column), (casts.largest(weight), True)
            amax_x, casts.amax = how.agreed(*largest)
        rows, ranks = fp8.quantize(operand, fp8.E4M3, amax_x), 1
        if how.gather:
            rows, ranks = _gather_cast(rows, how.group), how.group.size()
        out = how.product(rows, casts.cast(weight), weight.dtype, forward=True)
        ctx.made_of = None if isinstance(operand, Tensor) else type(operand)
        ctx.save_for_backward(weight, amax_x, *((operand,) if isinstance(operand, Tensor) else operand))
        ctx.how, ctx.casts = how, casts
        return out.view(ranks * x.size(0), *x.shape[1:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of input and weight; communication overlaps with the products, as in the engine's own layers."""
        weight, amax_x, *parts = ctx.saved_tensors
        how, learns, gathered = ctx.how, ctx.needs_input_grad[1], None
        rows: Operand = ctx.made_of(*parts) if ctx.made_of else parts[0]
        if how.gather and learns:
            rows, gathered = _gather(fp8.written(rows), how.group, wait=False)
        upstream, amax_grad = grad.flatten(0, -2), None
        if how.scaling == "tensorwise":
            (amax_grad,) = how.agreed((fp8.largest(upstream), how.column))
        dtype = fp8.GRADIENT_DTYPE[how.scaling]
        grad_x = how.product(
            fp8.quantize(upstream, dtype, amax_grad), ctx.casts.cast(weight, transpose=True), weight.dtype
        )
        grad_x, reduced = _reduce(grad_x.view(*grad.shape[:-1], -1), how)
        grad_weight = None
        if learns:
            if gathered:
                gathered.wait()
            grad_weight = how.weight_gradient(
                weight,
                fp8.quantize(upstream, dtype, amax_grad, transpose=True),
                fp8.quantize(rows, fp8.E4M3, amax_x, transpose=True),
            )
        if reduced:
            reduced.wait()
        return grad_x, grad_weight, None, None, None


def _gather(x: Tensor, group: dist.ProcessGroup, wait: bool = True) -> tuple[Tensor, dist.Work | None]:
    """All shards of the rows [rows, channels] of a sequence, and the handle to wait on if not `wait`."""
    whole = torch.empty(x.size(0) * group.size(), *x.shape[1:], dtype=x.dtype, device=x.device)
    return whole, dist.all_gather_into_tensor(whole, x.contiguous(), group=group, async_op=not wait)


def _gather_cast(rows: fp8.Quantized, group: dist.ProcessGroup) -> fp8.Quantized:
    """All shards of rows in FP8, which travel as bytes, and of their scales where each row has its own."""
    values = _gather(rows.values.view(torch.uint8), group)[0].view(rows.values.dtype)
    return fp8.Quantized(values, _gather(rows.scale, group)[0] if rows.scale.ndim else rows.scale)


def _reduce(grad: Tensor, how: _How) -> tuple[Tensor, dist.Work | None]:
    """The gradient summed over ranks, this rank's shard of a gathered input, with the handle to wait on; unchanged if
    there is no sum."""
    if how.gather:
        shard = grad.new_empty(grad.size(0) // how.group.size(), *grad.shape[1:])
        return shard, dist.reduce_scatter_tensor(shard, grad, group=how.group, async_op=True)
    return grad, dist.all_reduce(grad, group=how.group, async_op=True) if how.reduce else None
