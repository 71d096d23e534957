"""Cross entropy fused with the product of the language-model head: logits of one chunk of tokens at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flm_megatron.device.chunks import LARGE_LOGITS_BYTES, SMALLEST_HEAD_CHUNK
from flm_megatron.kernels.autograd import Context
from flm_megatron.kernels.choice import current, implementation
from flm_megatron.kernels.loss import CROSS_ENTROPY, CrossEntropyKernels, Group, over_vocabulary, vocabulary_shard
from flm_megatron.kernels.weight_gradient import WEIGHT_GRADIENT, WeightGradientKernel


def fuses_head_and_loss(hidden: Tensor, weight: Tensor, sequence_shards: int = 1) -> bool:
    """Whether the choice of this process is `linear_cross_entropy` for this head and this many hidden states, of
    which `hidden` is one of `sequence_shards` shards."""
    asked = current().head_and_loss
    if asked != "auto":
        return asked == "fused"
    logits = hidden.numel() // hidden.size(-1) * sequence_shards * weight.size(0) * hidden.element_size()
    return logits >= LARGE_LOGITS_BYTES


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    token_weights: Tensor,
    vocab_size: int | None = None,
    group: Group = None,
    chunk_tokens: int | None = None,
    buffer: Tensor | None = None,
    placeholder: bool = True,
) -> tuple[Tensor, Tensor]:
    """Sum over tokens of weight times loss (0-dim), and the loss of each token [...] without gradient; both fp32.

    `hidden` is [..., channels], `weight` [width, channels] this rank's rows of the head, `labels` and
    `token_weights` [...]. Ids, padding and `group` are as in `cross_entropy`. Gradients of hidden and weight are
    computed chunk by chunk in the forward pass, which is why token weights (such as a loss mask) come in here; the
    backward pass only multiplies them. Under tensor parallelism the gradient of `hidden` is this rank's shard of a
    sum over ranks, which the caller reduces.

    With `buffer` (fp32, like `weight`) the forward pass adds the gradient of `weight` to it, where gradients are
    enabled and the weight learns, and no tensor of that size is made; the sum is then to be differentiated once, with
    a gradient of one, which is checked. What `weight` gets as its gradient is then an unwritten `placeholder`, which a
    weight must not have that gets a gradient elsewhere as well.
    """
    rows = hidden.reshape(-1, hidden.size(-1)).contiguous()
    start, valid = vocabulary_shard(weight.size(0), vocab_size, group)
    learns = torch.is_grad_enabled() and weight.requires_grad
    plan = _Plan(
        valid=valid,
        group=group,
        chunk_tokens=chunk_tokens or _chunk_tokens(rows, weight),
        needs_gradients=learns or (torch.is_grad_enabled() and hidden.requires_grad),
        learns=learns,
        buffer=buffer,
        placeholder=placeholder,
        loss=implementation(CROSS_ENTROPY, hidden),
        accumulation=implementation(WEIGHT_GRADIENT, hidden),
    )
    total, losses = _LinearCrossEntropy.apply(rows, weight, labels.reshape(-1) - start, token_weights.reshape(-1), plan)
    return total, losses.view(labels.shape)


@dataclass(frozen=True)
class _Plan:
    """How one call is computed: ids that exist here, tokens of a chunk, which gradients are wanted and where that of
    the weight goes, and the implementations."""

    valid: int
    group: Group
    chunk_tokens: int
    needs_gradients: bool
    learns: bool
    buffer: Tensor | None
    placeholder: bool
    loss: CrossEntropyKernels
    accumulation: WeightGradientKernel


def _chunk_tokens(rows: Tensor, weight: Tensor) -> int:
    """Tokens whose logits take as much memory as all hidden states, but enough to keep the products efficient."""
    smallest = SMALLEST_HEAD_CHUNK["cpu" if current().device == "cpu" else "cuda"]
    return max(rows.numel() // weight.size(0), smallest)


class _Context(Context, Protocol):
    plan: _Plan
    grad_rows: Tensor | None
    grad_weight: Tensor | None
    shape: torch.Size
    dtype: torch.dtype


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Context, rows: Tensor, weight: Tensor, labels: Tensor, token_weights: Tensor, plan: _Plan
    ) -> tuple[Tensor, Tensor]:
        """Value of the operation; computes its gradients too."""
        working = torch.float64 if rows.dtype is torch.float64 else torch.float32
        token_weights = token_weights.to(working)
        losses = torch.empty(rows.size(0), dtype=working, device=rows.device)
        grad_rows = torch.empty_like(rows) if plan.needs_gradients else None
        grad_weight = plan.buffer if plan.learns else None
        if plan.learns and grad_weight is None:
            grad_weight = torch.zeros(weight.shape, dtype=working, device=weight.device)
        space = rows.new_empty(min(plan.chunk_tokens, rows.size(0)), weight.size(0))  # one for all chunks
        for chunk in _chunks(rows.size(0), plan.chunk_tokens):
            logits = torch.mm(rows[chunk], weight.t(), out=space[: chunk.stop - chunk.start])
            log_sum, at_label = over_vocabulary(plan.loss.statistics(logits, labels[chunk], plan.valid), plan.group)
            torch.sub(log_sum, at_label, out=losses[chunk])
            if grad_rows is not None:
                plan.loss.gradient(logits, labels[chunk], plan.valid, log_sum, token_weights[chunk], out=logits)
                torch.mm(logits, weight, out=grad_rows[chunk])
            if grad_weight is not None:
                plan.accumulation.add_(grad_weight, rows[chunk], logits)
        ctx.plan, ctx.grad_rows = plan, grad_rows
        ctx.grad_weight = grad_weight if plan.buffer is None else None
        ctx.shape, ctx.dtype = weight.shape, weight.dtype
        ctx.mark_non_differentiable(losses)
        return torch.dot(losses, token_weights), losses

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the inputs."""
        assert ctx.grad_rows is not None, "the gradients of a fused loss are there for one backward pass"
        grad_rows = _scaled(ctx.grad_rows, grad)
        grad_weight = None
        if ctx.grad_weight is not None:
            grad_weight = _scaled(ctx.grad_weight, grad).to(ctx.dtype)
        elif ctx.plan.learns:
            torch._assert_async(grad == 1, "a fused loss that adds to a buffer is differentiated with a gradient of 1")
            if ctx.plan.placeholder:
                grad_weight = torch.empty(ctx.shape, dtype=ctx.dtype, device=grad.device)
        ctx.grad_rows = ctx.grad_weight = None
        return grad_rows, grad_weight, None, None, None


def _chunks(tokens: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, tokens)) for start in range(0, tokens, size))


def _scaled(grad: Tensor, factor: Tensor) -> Tensor:
    """`grad` times `factor`; on a CPU, where looking costs nothing, a factor of one is left out."""
    return grad if factor.device.type == "cpu" and factor.item() == 1 else grad.mul_(factor)
