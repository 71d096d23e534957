"""Weight gradients that megatron-core's linear layers add straight to the fp32 gradient buffers.

The engine has the code path (`gradient_accumulation_fusion`), which calls two functions of an Apex extension. Here they
are our kernel operation `weight_gradient`, which does not need Apex.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from flm_megatron import kernels
from flm_megatron.engine import tensor_parallel
from flm_megatron.engine.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from flm_megatron.model.teleflm import TeleFLM


def install_weight_gradient() -> None:
    """Install our operation where megatron-core's linear layers look for Apex's extension."""
    tensor_parallel.install_weight_gradient(_accumulate)


def accumulate_in_buffers(chunks: Sequence[nn.Module]) -> None:
    """From now on linear layers of `chunks` add the gradients of their weights to `weight.main_grad`.

    The chunks are wrapped in megatron-core's DistributedDataParallel, which gives every weight that learns its part
    of a gradient buffer; what it then finds in `weight.grad` is an unwritten placeholder. Frozen weights have
    neither gradient nor buffer.
    """
    install_weight_gradient()
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, (ColumnParallelLinear, RowParallelLinear)) and hasattr(module.weight, "main_grad"):
                module.gradient_accumulation_fusion = True
            if isinstance(module, TeleFLM) and module.post_process and hasattr(module.head_weight(), "main_grad"):
                module.output_layer.gradient_accumulation_fusion = True  # a tied head has no weight of its own


def _accumulate(total_input: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
    """With the arguments of the extension: [tokens, inputs], [tokens, outputs] and the buffer [outputs, inputs]."""
    kernels.add_weight_gradient_(main_grad, total_input, grad_output)
