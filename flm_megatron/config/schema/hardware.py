"""How a run is laid out on machines: parallel layout, processes and network, implementations of operations."""

from __future__ import annotations

from typing import Literal

from flm_megatron.config.numbers import dataclass
from flm_megatron.config.schema.settings import SETTINGS


@dataclass(config=SETTINGS)
class ParallelConfig:
    """How one stage is spread over processes. The data-parallel size is what remains of the world."""

    tensor: int = 1
    """Tensor-parallel size."""
    pipeline: int = 1
    """Pipeline-parallel size."""
    virtual_pipeline: int = 1
    """Model chunks per pipeline rank; above 1 the interleaved schedule is used."""
    data: int | None = None
    """Data-parallel size; none means world size / (tensor x pipeline)."""
    sequence: bool = False
    """Split norms and residuals along the sequence within tensor groups."""
    context: int = 1
    """Context-parallel size (refused above 1 for now)."""
    expert: int = 1
    """Expert-parallel size (refused above 1 for now)."""
    pipeline_layers: list[int] | None = None
    """Layers of each model chunk in the order of execution (pipeline x virtual_pipeline numbers); none splits as evenly
    as possible, with larger chunks first."""
    distributed_optimizer: bool = True
    """Shard optimizer state over data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Overlap the reduction of gradients with the backward pass."""
    overlap_param_gather: bool = False
    """Overlap the gathering of parameters with the forward pass (needs the distributed optimizer)."""

    @property
    def model_size(self) -> int:
        """Processes that hold one replica of the model."""
        return self.tensor * self.pipeline

    @property
    def processes(self) -> int:
        """Processes of the layout; those of one replica where the data-parallel size is left open."""
        return self.model_size * (self.data or 1)


@dataclass(config=SETTINGS)
class DistributedConfig:
    """Processes, and how long they wait for each other."""

    processes: int | None = None
    """Processes that `flm train` starts without a launcher; none means as many as the stage's layout needs."""
    timeout_s: int = 600
    """Seconds a collective may wait before the run fails with the rank's name."""


Implementation = Literal["auto", "te", "apex", "triton", "torch", "compile"]


@dataclass(config=SETTINGS)
class KernelsConfig:
    """Which implementation runs each fused operation: Transformer Engine's, Apex's, a Triton kernel, plain PyTorch, or
    PyTorch through torch.compile.

    `auto` takes the best one available (PyTorch on a CPU); naming one that is not available is an error.
    """

    rms_norm: Implementation = "auto"
    """RMSNorm: apex, triton, torch or compile."""
    swiglu: Implementation = "auto"
    """SwiGLU on the fused gate and up projection: triton, torch or compile."""
    rotary: Implementation = "auto"
    """Rotary positions on the packed query, key and value: triton, torch or compile."""
    cross_entropy: Implementation = "auto"
    """Cross entropy over the split vocabulary: triton or torch."""
    adamw: Implementation = "auto"
    """Optimizer update: te, apex, torch or triton."""
    grad_clip: Implementation = "auto"
    """Gradient norm and clipping: te, apex, torch or triton."""
    fp8_cast: Implementation = "auto"
    """Casts of matrices to FP8: triton or torch."""
    weight_gradient: Implementation = "auto"
    """Weight gradients added to their fp32 buffers by the product that computes them: apex or torch."""
    head_and_loss: Literal["auto", "fused", "separate"] = "auto"
    """`fused` keeps the logits of some tokens at a time and computes their gradient at once, `separate` keeps the
    logits of a whole micro-batch until the backward pass; auto is fused where the logits are large. (A z-loss needs
    them all.)"""
