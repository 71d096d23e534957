"""Cross entropy over one rank's shard of the vocabulary in plain PyTorch, some rows at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from flm_megatron.kernels.row_chunks import row_chunks


def statistics(logits: Tensor, labels: Tensor, valid: int) -> Tensor:
    """Log of the sum of exponentials, and the label's logit, of each row: [2, rows] in fp32 (float64 for float64).

    `logits` [rows, width] is this rank's shard of the vocabulary, of which the first `valid` ids exist. `labels`
    [rows] counts from the shard's first id; a row whose label is not in the shard gets 0 for the label's logit.
    """
    found = torch.full((2, logits.size(0)), -torch.inf, dtype=_working(logits), device=logits.device)
    here = (labels >= 0) & (labels < valid)
    at_label = logits.gather(1, labels.clamp(0, logits.size(1) - 1).unsqueeze(1)).squeeze(1)
    found[1] = torch.where(here, at_label, 0)
    if valid:
        for rows in row_chunks(logits):
            values = logits[rows, :valid].to(found.dtype)
            largest = values.amax(-1, keepdim=True)
            found[0, rows] = (values - largest).exp_().sum(-1).log_().add_(largest.squeeze(1))
    return found


def gradient(logits: Tensor, labels: Tensor, valid: int, log_sum: Tensor, scale: Tensor, out: Tensor) -> None:
    """Write scale (softmax - one at the label) to `out` [rows, width], which may be `logits` itself.

    `log_sum` and `scale` are [rows] in fp32; the softmax is exp(logit - log_sum), over the whole vocabulary.
    """
    out[:, valid:] = 0
    if not valid:
        return
    here = (labels >= 0) & (labels < valid)
    index = labels.clamp(0, valid - 1).unsqueeze(1)
    at_label = torch.where(here, -scale, 0).unsqueeze(1)
    direct = out.dtype is log_sum.dtype
    for rows in row_chunks(logits):
        target = out[rows, :valid]
        values = torch.sub(logits[rows, :valid], log_sum[rows, None], out=target if direct else None)
        values.exp_().mul_(scale[rows, None]).scatter_add_(1, index[rows], at_label[rows])
        if not direct:
            target.copy_(values)


def _working(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype is torch.float64 else torch.float32
