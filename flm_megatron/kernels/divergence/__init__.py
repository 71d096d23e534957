"""Divergence of a student's logits from a teacher's, whose vocabulary is split over tensor-parallel ranks.

It has one implementation, in plain PyTorch: a run file's `kernels` does not name it.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from flm_megatron.kernels.autograd import Context
from flm_megatron.kernels.divergence import reference
from flm_megatron.kernels.loss import Group, vocabulary_shard


def kl_divergence(
    logits: Tensor, teacher: Tensor, temperature: float = 1.0, vocab_size: int | None = None, group: Group = None
) -> Tensor:
    """KL(teacher || student) of each token [...] in nats, in fp32 (float64 for float64): the sum over the vocabulary of
    p (log p - log q), where p and q are the softmax of the teacher's and the student's logits over `temperature`.

    `logits` [..., width] is this rank's shard of the vocabulary, rank r of `group` having the ids from r width on; ids
    from `vocab_size` on are padding, with probability 0 and gradient 0. `teacher` [..., valid], without gradient, has
    the same ids without padding. No logits are gathered: ranks exchange three numbers a token.
    """
    rows = logits.reshape(-1, logits.size(-1)).contiguous()
    _, valid = vocabulary_shard(rows.size(1), vocab_size, group)
    assert teacher.size(-1) == valid, f"the teacher has {teacher.size(-1)} ids of the {valid} of this shard"
    other = teacher.detach().reshape(-1, valid) if valid else teacher.new_empty(rows.size(0), 0)
    return _KLDivergence.apply(rows, other, temperature, group).view(logits.shape[:-1])


def over_vocabulary(found: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logs of the sums of exponentials of student and teacher, and the divergence, of each row [rows] of the whole
    vocabulary, from the statistics [shards, 3, rows] of its shards (see `reference.statistics`)."""
    student, teacher = found[:, 0].logsumexp(0), found[:, 1].logsumexp(0)
    shares = (found[:, 1] - teacher).exp()
    return student, teacher, (shares * found[:, 2]).sum(0) + student - teacher


class _Context(Context, Protocol):
    temperature: float


class _KLDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, logits: Tensor, teacher: Tensor, temperature: float, group: Group) -> Tensor:
        """Value of the operation; keeps what its gradient needs."""
        found = reference.statistics(logits, teacher, temperature)
        shards = 1 if group is None else dist.get_world_size(group)
        gathered = found
        if shards > 1:
            gathered = found.new_empty(shards * 3, found.size(1))
            dist.all_gather_into_tensor(gathered, found, group=group)
        student_sum, teacher_sum, divergence = over_vocabulary(gathered.view(shards, 3, -1))
        ctx.save_for_backward(logits, teacher, student_sum, teacher_sum)
        ctx.temperature = temperature
        return divergence

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor, None, None, None]:
        """Gradient of the student's logits."""
        logits, teacher, *log_sums = ctx.saved_tensors
        out = torch.empty_like(logits)
        reference.gradient(logits, teacher, ctx.temperature, log_sums, grad.contiguous(), out)
        return out, None, None, None
