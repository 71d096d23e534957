"""What the engine's objects are to the rest of the program: the methods that it uses, typed.

megatron-core's wheel carries no types. Here is of each class what this program calls, so that a call that does not
exist is a mistake before it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import nn

ParameterGroup = dict[str, Any]
"""A group of torch's optimizers: `params`, and settings such as `lr` by name."""
SyncFunctions = Callable[..., object] | list[Callable[..., object]]


class ModelParallelConfig(Protocol):
    """What a configuration of the engine holds for its schedules to call."""

    finalize_model_grads_func: Callable[..., None]
    grad_scale_func: Callable[[torch.Tensor], torch.Tensor]
    no_sync_func: SyncFunctions
    grad_sync_func: SyncFunctions
    param_sync_func: SyncFunctions


class OptimizerSettings(Protocol):
    """What the program reads of the engine's OptimizerConfig."""

    clip_grad: float


class ChainedPart(Protocol):
    """One optimizer of those that a rank has: its model chunks' dense parameters, or nothing."""

    config: OptimizerSettings
    optimizer: torch.optim.Optimizer
    is_stub_optimizer: bool
    init_state_fn: Callable[[torch.optim.Optimizer, OptimizerSettings], None]

    def get_parameters(self) -> list[torch.Tensor]:
        """The fp32 masters that this rank updates."""
        ...

    def get_main_grads_for_grad_norm(self) -> list[torch.Tensor]:
        """The gradients that this rank counts for the global norm."""
        ...


class Optimizer(Protocol):
    """megatron-core's ChainedOptimizer."""

    chained_optimizers: Sequence[ChainedPart]

    @property
    def param_groups(self) -> list[ParameterGroup]:
        """The groups of all parts; their parameters are the masters."""
        ...

    def zero_grad(self) -> None:
        """Forget the gradients."""
        ...

    def prepare_grads(self) -> bool:
        """Hand the gradient buffers to the masters; returns whether one is infinite (which fp16 alone can tell)."""
        ...

    def get_grad_stats_parallel_group(self) -> dist.ProcessGroup | None:
        """The ranks that hold all gradients between them; none for the world."""
        ...

    def step_with_ready_grads(self) -> bool:
        """Update the masters, and the weights from them."""
        ...

    def scale_loss(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss times the loss scale (1 but for fp16)."""
        ...

    def reload_model_params(self) -> None:
        """Set the masters from the weights."""
        ...


if TYPE_CHECKING:

    class ModelChunk(nn.Module):
        """The layers that one pipeline rank runs without a break, wrapped for data parallelism or not."""

        config: ModelParallelConfig

        def sharded_state_dict(
            self, prefix: str = "", sharded_offsets: Iterable[object] = (), metadata: Mapping[str, object] | None = None
        ) -> dict[str, object]:
            """Where the parameters lie in the logical tensors."""

    class ReplicatedChunk(ModelChunk):
        """A model chunk in megatron-core's DistributedDataParallel."""

        module: nn.Module

        def zero_grad_buffer(self) -> None:
            """Zero the gradient buffers."""

        def scale_gradients(self, factor: torch.Tensor) -> None:
            """Multiply the gradient buffers."""

        def no_sync(self) -> AbstractContextManager[None]:
            """While it runs, gradients are added up here alone."""

        def start_grad_sync(self) -> None:
            """Begin to reduce gradients over the data-parallel ranks."""

        def start_param_sync(self, *, force_sync: bool = False) -> None:
            """Begin to gather weights that other data-parallel ranks have updated; wait for them with `force_sync`."""

else:
    ModelChunk = ReplicatedChunk = nn.Module
