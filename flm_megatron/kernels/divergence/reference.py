"""Divergence over one rank's shard of the vocabulary in plain PyTorch, some rows at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flm_megatron.kernels.row_chunks import row_chunks


def statistics(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """What a shard adds to the divergence of each row: [3, rows] in fp32 (float64 for float64).

    `logits` is [rows, width], `teacher` [rows, valid] the same ids without padding. The logs of the sums of
    exponentials of both over `temperature`, and the mean of teacher minus student over `temperature`, under the
    teacher's distribution within the shard. A shard of padding alone has -inf, -inf, 0.
    """
    valid = teacher.size(1)
    found = torch.full((3, logits.size(0)), -torch.inf, dtype=_working(logits), device=logits.device)
    found[2] = 0
    if valid:
        for rows in row_chunks(logits):
            student, wanted = _scaled(logits[rows, :valid], temperature), _scaled(teacher[rows], temperature)
            found[0, rows], found[1, rows] = student.logsumexp(-1), wanted.logsumexp(-1)
            shares = torch.exp(wanted - found[1, rows, None])
            found[2, rows] = shares.mul_(wanted.sub_(student)).sum(-1)
    return found


def gradient(
    logits: Tensor, teacher: Tensor, temperature: float, log_sums: Sequence[Tensor], scale: Tensor, out: Tensor
) -> None:
    """Write scale (q - p) / temperature to `out` [rows, width], where q and p are the softmax of student and teacher
    over `temperature`; 0 for padding.

    `log_sums` are the logs of the sums of exponentials of student and teacher [rows] over the whole vocabulary, `scale`
    is [rows].
    """
    valid = teacher.size(1)
    out[:, valid:] = 0
    if not valid:
        return
    of_student, of_teacher = log_sums
    for rows in row_chunks(logits):
        student, wanted = _scaled(logits[rows, :valid], temperature), _scaled(teacher[rows], temperature)
        shares = student.sub_(of_student[rows, None]).exp_().sub_(wanted.sub_(of_teacher[rows, None]).exp_())
        out[rows, :valid] = shares.mul_(scale[rows, None] / temperature)


def _scaled(values: Tensor, temperature: float) -> Tensor:
    """A copy in the working precision, over `temperature`."""
    return values.to(_working(values)).div(temperature)


def _working(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype is torch.float64 else torch.float32
