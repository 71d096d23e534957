"""AdamW over a list of tensors in one Triton launch: each value is read once and written once."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language import tensor

from flm_megatron.kernels.adam import Hyperparameters, TensorLists
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


def update_(lists: TensorLists, hyper: Hyperparameters, grad_factor: Tensor | None) -> None:
    """One AdamW update in place; see `kernels.adamw_`. The tensors of one list are contiguous and of one dtype."""
    table, work = addresses(*lists), spans(lists.params)
    step_size = hyper.lr / (1.0 - hyper.beta1**hyper.step)
    root_correction = (1.0 - hyper.beta2**hyper.step) ** 0.5
    _adamw_kernel[(work.size(0),)](
        table, work, len(lists.params), table if grad_factor is None else grad_factor,
        lists.params[0], lists.grads[0], lists.exp_avgs[0],
        1.0 - hyper.lr * hyper.weight_decay, hyper.beta1, hyper.beta2, step_size, root_correction, hyper.eps,
        HAS_FACTOR=grad_factor is not None,
    )  # fmt: skip
