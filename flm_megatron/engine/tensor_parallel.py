"""megatron-core's linear layers, collectives and recomputation; importing this imports the engine."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

from torch import Tensor, nn

from flm_megatron.engine.prepare import prepare
from flm_megatron.engine.replaced import replace

prepare()

from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    checkpoint,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    layers,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput, model_parallel_cuda_manual_seed
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

__all__ = [
    "CheckpointWithoutOutput",
    "ColumnParallelLinear",
    "RowParallelLinear",
    "VocabParallelEmbedding",
    "apply_swiglu_sharded_factory",
    "checkpoint",
    "copy_to_tensor_model_parallel_region",
    "gather_from_sequence_parallel_region",
    "install_weight_gradient",
    "make_sharded_tensors_for_checkpoint",
    "mark_split",
    "model_parallel_cuda_manual_seed",
    "reduce_from_tensor_model_parallel_region",
    "reduce_scatter_to_sequence_parallel_region",
    "weight_gradient_is_fused",
]


def mark_split(parameter: nn.Parameter, axis: int, split: bool = True) -> None:
    """Say that a parameter is split over tensor-parallel ranks along `axis`; without the mark its gradient's norm
    would count on one rank only. From 0.19 on the engine marks what it makes itself."""
    if not hasattr(parameter, "tensor_model_parallel"):
        set_tensor_model_parallel_attributes(parameter, split, axis if split else -1, 1)


def install_weight_gradient(accumulate: Callable[[Tensor, Tensor, Tensor], None]) -> None:
    """Put a function where linear layers look for the extension of Apex that adds weight gradients to their buffers.

    `accumulate(total_input, grad_output, main_grad)` gets [tokens, inputs], [tokens, outputs] and the buffer
    [outputs, inputs].
    """
    extension = SimpleNamespace(wgrad_gemm_accum_fp32=accumulate, wgrad_gemm_accum_fp16=accumulate)
    replace(layers, fused_weight_gradient_mlp_cuda=extension, _grad_accum_fusion_available=True)


def weight_gradient_is_fused() -> bool:
    """Whether linear layers find such an extension."""
    return layers._grad_accum_fusion_available
