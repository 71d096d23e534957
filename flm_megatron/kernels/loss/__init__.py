"""Cross entropy of logits whose vocabulary is split over tensor-parallel ranks."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from flm_megatron.kernels.autograd import Context
from flm_megatron.kernels.choice import implementation
from flm_megatron.kernels.registry import Implementation, Operation

Group = dist.ProcessGroup | None


class CrossEntropyKernels(Protocol):
    """What an implementation of cross entropy over one rank's part of the vocabulary has.

    `logits` is [rows, width], of which the first `valid` ids exist; `labels` [rows] counts from the part's first id.
    """

    def statistics(self, logits: Tensor, labels: Tensor, valid: int) -> Tensor:
        """Log of the sum of exponentials, and the label's logit, of each row: [2, rows]; see `reference.statistics`."""

    def gradient(self, logits: Tensor, labels: Tensor, valid: int, log_sum: Tensor, scale: Tensor, out: Tensor) -> None:
        """Write scale (softmax - one at the label) to `out` [rows, width]; see `reference.gradient`."""


def _triton() -> CrossEntropyKernels:
    from flm_megatron.kernels.loss import triton_kernels

    return triton_kernels


def _torch() -> CrossEntropyKernels:
    from flm_megatron.kernels.loss import reference

    return reference


CROSS_ENTROPY: Operation[CrossEntropyKernels] = Operation(
    "cross_entropy", {"triton": Implementation(_triton), "torch": Implementation(_torch)}
)


def cross_entropy(
    logits: Tensor, labels: Tensor, vocab_size: int | None = None, group: Group = None, overwrite: bool = False
) -> Tensor:
    """Loss of each token [...] in nats, in fp32.

    `logits` [..., width] is this rank's shard of the vocabulary, rank r of `group` having the ids from r width on;
    `labels` [...] are global ids. Ids from `vocab_size` on are padding: they have probability 0 and gradient 0,
    whatever their logits are. A label outside the vocabulary counts as none: its loss is the log of the sum of
    exponentials, to be masked by the caller. With `overwrite` the backward pass writes the gradient over the
    logits, which nothing else may read afterwards; it then runs once only.
    """
    rows = logits.reshape(-1, logits.size(-1)).contiguous()
    start, valid = vocabulary_shard(rows.size(1), vocab_size, group)
    local = labels.reshape(-1) - start
    kernels = implementation(CROSS_ENTROPY, logits)
    return _CrossEntropy.apply(rows, local, valid, group, overwrite, kernels).view(labels.shape)


def vocabulary_shard(width: int, vocab_size: int | None, group: Group) -> tuple[int, int]:
    """First id of this rank's shard of the vocabulary, and how many of its `width` ids are no padding."""
    start = 0 if group is None else dist.get_rank(group) * width
    return start, width if vocab_size is None else max(0, min(width, vocab_size - start))


def over_vocabulary(found: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """Statistics [2, rows] of one shard (see `reference.statistics`) made those of the whole vocabulary.

    One gather of two numbers a row; every rank then adds them up in the same order.
    """
    if group is None or dist.get_world_size(group) == 1:
        return found[0], found[1]
    stats = found.new_empty(dist.get_world_size(group) * 2, found.size(1))
    dist.all_gather_into_tensor(stats, found, group=group)
    return stats[0::2].logsumexp(0), stats[1::2].sum(0)


class _Context(Context, Protocol):
    valid: int
    overwrite: bool
    kernels: CrossEntropyKernels


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Context,
        logits: Tensor,
        labels: Tensor,
        valid: int,
        group: Group,
        overwrite: bool,
        kernels: CrossEntropyKernels,
    ) -> Tensor:
        """Value of the operation; keeps what its gradient needs."""
        log_sum, at_label = over_vocabulary(kernels.statistics(logits, labels, valid), group)
        ctx.save_for_backward(logits, labels, log_sum)
        ctx.valid, ctx.overwrite, ctx.kernels = valid, overwrite, kernels
        return log_sum - at_label

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        """Gradients of the inputs."""
        logits, labels, log_sum = ctx.saved_tensors
        # Written through a detached view, which marks the logits as changed: a second backward pass is refused.
        out = logits.detach() if ctx.overwrite else torch.empty_like(logits)
        ctx.kernels.gradient(logits, labels, ctx.valid, log_sum, grad.contiguous(), out)
        return out, None, None, None, None, None
