"""AdamW over a list of tensors in one Triton launch: each value is read once and written once."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor
from triton.language import tensor

from flm_megatron.kernels.tensor_list_triton import BLOCK, addresses, spans


@triton.jit
def _adamw_kernel(
    address_ptr: tensor, span_ptr: tensor, tensors: tensor, factor_ptr: tensor,
    param_like: tensor, grad_like: tensor, moment_like: tensor,
    decay: tensor, beta1: tensor, beta2: tensor, step_size: tensor, root_correction: tensor, eps: tensor,
    HAS_FACTOR: tl.constexpr,
) -> None:  # fmt: skip
    program = tl.program_id(0)
    index = tl.load(span_ptr + program * 3)
    first, last = tl.load(span_ptr + program * 3 + 1), tl.load(span_ptr + program * 3 + 2)
    # Addresses come as integers; the `like` pointers say what lies there.
    param_ptr = tl.load(address_ptr + index).to(param_like.dtype)
    grad_ptr = tl.load(address_ptr + tensors + index).to(grad_like.dtype)
    average_ptr = tl.load(address_ptr + 2 * tensors + index).to(moment_like.dtype)
    square_ptr = tl.load(address_ptr + 3 * tensors + index).to(moment_like.dtype)
    factor = tl.load(factor_ptr) if HAS_FACTOR else 1.0
    for start in range(first, last, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < last
        param = tl.load(param_ptr + at, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32) * factor
        if HAS_FACTOR:
            tl.store(grad_ptr + at, grad.to(grad_ptr.dtype.element_ty), mask=inside)
        average = tl.load(average_ptr + at, mask=inside, other=0.0).to(tl.float32)
        square = tl.load(square_ptr + at, mask=inside, other=0.0).to(tl.float32)
        average += (grad - average) * (1.0 - beta1)
        square = square * beta2 + grad * grad * (1.0 - beta2)
        param = param * decay - step_size * average / (tl.sqrt(square) / root_correction + eps)
        tl.store(param_ptr + at, param.to(param_ptr.dtype.element_ty), mask=inside)
        tl.store(average_ptr + at, average.to(average_ptr.dtype.element_ty), mask=inside)
        tl.store(square_ptr + at, square.to(square_ptr.dtype.element_ty), mask=inside)


def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_factor: Tensor | None = None,
) -> None:
    """One AdamW update in place; see `kernels.adamw_`. The tensors of one list are contiguous and of one dtype."""
    table, work = addresses(params, grads, exp_avgs, exp_avg_sqs), spans(params)
    _adamw_kernel[(work.size(0),)](
        table, work, len(params), table if grad_factor is None else grad_factor,
        params[0], grads[0], exp_avgs[0],
        1.0 - lr * weight_decay, beta1, beta2, lr / (1.0 - beta1**step), (1.0 - beta2**step) ** 0.5, eps,
        HAS_FACTOR=grad_factor is not None,
    )  # fmt: skip
