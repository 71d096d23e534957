"""z-loss: the squared log of the softmax's denominator (PaLM, arXiv 2204.02311), which keeps logits from drifting."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from torch import Tensor


def z_loss(logits: Tensor) -> Tensor:
    """log(sum of exponentials)^2 of each token [...] in fp32.

    `logits` [..., width] is this tensor-parallel rank's part of the vocabulary without padding ids; it may be empty.
    """
    largest = logits.new_full((*logits.shape[:-1], 1), -torch.inf, dtype=torch.float32)
    if logits.size(-1):
        largest.copy_(logits.detach().amax(-1, keepdim=True))
    if parallel_state.get_tensor_model_parallel_world_size() > 1:
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=parallel_state.get_tensor_model_parallel_group())
    # A copy: the gradient of the loss may be written over the logits.
    exponentials = torch.exp(logits.float() - largest).sum(-1)
    total = reduce_from_tensor_model_parallel_region(exponentials)
    return (total.log() + largest.squeeze(-1)).square()
