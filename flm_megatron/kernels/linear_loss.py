"""Cross entropy fused with the product of the language-model head: logits of one chunk of tokens at a time."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flm_megatron.kernels.choice import implementation
from flm_megatron.kernels.loss import Group, over_vocabulary, vocabulary_part

# Below this many tokens the matrix products of a chunk no longer fill a processor.
SMALLEST_CHUNK = 512


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    token_weights: Tensor,
    vocab_size: int | None = None,
    group: Group = None,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum over tokens of weight times loss (0-dim), and the loss of each token [...] without gradient; both fp32.

    `hidden` is [..., channels], `weight` [width, channels] this rank's rows of the head, `labels` and
    `token_weights` [...]. Ids, padding and `group` are as in `cross_entropy`. Gradients of hidden and weight are
    computed chunk by chunk in the forward pass, which is why token weights (such as a loss mask) come in here; the
    backward pass only multiplies them. Under tensor parallelism the gradient of `hidden` is this rank's part of a
    sum over ranks, which the caller reduces.
    """
    rows = hidden.reshape(-1, hidden.size(-1)).contiguous()
    start, valid = vocabulary_part(weight.size(0), vocab_size, group)
    total, losses = _LinearCrossEntropy.apply(
        rows,
        weight,
        labels.reshape(-1) - start,
        token_weights.reshape(-1),
        valid,
        group,
        chunk_tokens or _chunk_tokens(rows, weight),
        torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad),
        implementation("cross_entropy", hidden),
    )
    return total, losses.view(labels.shape)


def _chunk_tokens(rows: Tensor, weight: Tensor) -> int:
    """Tokens whose logits take as much memory as all hidden states, but enough to keep the products efficient."""
    return max(rows.numel() // weight.size(0), SMALLEST_CHUNK)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        labels: Tensor,
        token_weights: Tensor,
        valid: int,
        group: Group,
        chunk_tokens: int,
        needs_gradients: bool,
        chosen: ModuleType,
    ) -> tuple[Tensor, Tensor]:
        """Value of the operation; keeps what its gradient needs."""
        working = torch.float64 if rows.dtype is torch.float64 else torch.float32
        token_weights = token_weights.to(working)
        losses = torch.empty(rows.size(0), dtype=working, device=rows.device)
        if needs_gradients:
            ctx.grad_rows = torch.empty_like(rows)
            ctx.grad_weight = torch.empty(weight.shape, dtype=working, device=weight.device)
        for chunk in _chunks(rows.size(0), chunk_tokens):
            logits = rows[chunk] @ weight.t()
            log_sum, at_label = over_vocabulary(chosen.statistics(logits, labels[chunk], valid), group)
            torch.sub(log_sum, at_label, out=losses[chunk])
            if needs_gradients:
                chosen.gradient(logits, labels[chunk], valid, log_sum, token_weights[chunk], out=logits)
                torch.mm(logits, weight, out=ctx.grad_rows[chunk])
                _accumulate(ctx.grad_weight, logits, rows[chunk], first=chunk.start == 0)
        ctx.dtype = weight.dtype
        ctx.mark_non_differentiable(losses)
        return torch.dot(losses, token_weights), losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
        """Gradients of the inputs."""
        assert ctx.grad_rows is not None, "the gradients of a fused loss are there for one backward pass"
        grad_rows, grad_weight = _scaled(ctx.grad_rows, grad), _scaled(ctx.grad_weight, grad).to(ctx.dtype)
        ctx.grad_rows = ctx.grad_weight = None
        return grad_rows, grad_weight, *[None] * 7


def _chunks(tokens: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, tokens)) for start in range(0, tokens, size))


def _accumulate(total: Tensor, grad_logits: Tensor, rows: Tensor, first: bool) -> None:
    if total.dtype is rows.dtype:
        torch.addmm(total, grad_logits.t(), rows, beta=0 if first else 1, out=total)
    elif first:
        total.copy_(grad_logits.t() @ rows)
    else:
        total += grad_logits.t() @ rows


def _scaled(grad: Tensor, factor: Tensor) -> Tensor:
    """`grad` times `factor`; on a CPU, where looking costs nothing, a factor of one is left out."""
    return grad if factor.device.type == "cpu" and factor.item() == 1 else grad.mul_(factor)
