"""Fused operations of training: Triton kernels, each beside its PyTorch reference, and the choice between them.

Each operation has a folder: its `__init__` is the operation as the model calls it, with the table of its
implementations and the Protocol that these satisfy, `reference` its formula in plain PyTorch, `triton_kernels` its
kernels (with `tensor_list_triton` the only files that import Triton), `compiled` its formula for torch.compile.
`registry` is what such a table is made of, `choice` says which of its rows runs.
"""

from flm_megatron.kernels import fp8
from flm_megatron.kernels.adam import adamw_
from flm_megatron.kernels.choice import Choice, choose, current, use
from flm_megatron.kernels.clip import NORM_FLOOR, clip_factor, clip_grad_norm_, grad_norm, scale_grads_
from flm_megatron.kernels.divergence import kl_divergence
from flm_megatron.kernels.glu import geglu, swiglu, unwritten_swiglu
from flm_megatron.kernels.loss import cross_entropy
from flm_megatron.kernels.loss.linear_loss import fuses_head_and_loss, linear_cross_entropy
from flm_megatron.kernels.norm import add_rms_norm, may_leave_unwritten, rms_norm, unwritten_rms_norm
from flm_megatron.kernels.rotary import rotary_qkv
from flm_megatron.kernels.weight_gradient import add_weight_gradient_, weight_gradient_notice

__all__ = [
    "NORM_FLOOR",
    "Choice",
    "adamw_",
    "add_rms_norm",
    "add_weight_gradient_",
    "choose",
    "clip_factor",
    "clip_grad_norm_",
    "cross_entropy",
    "current",
    "fp8",
    "fuses_head_and_loss",
    "geglu",
    "grad_norm",
    "kl_divergence",
    "linear_cross_entropy",
    "may_leave_unwritten",
    "rms_norm",
    "rotary_qkv",
    "scale_grads_",
    "swiglu",
    "unwritten_rms_norm",
    "unwritten_swiglu",
    "use",
    "weight_gradient_notice",
]
