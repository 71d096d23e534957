"""Collectives over groups of one rank, which gloo would copy through its buffers although nothing is to be done.

megatron-core reduces gradients and gathers parameters over data-parallel groups of any size; with one rank that costs a
pass over all of them each (benchmarks/throughput/profile.md).
"""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup | None
Collective = Callable[..., object]
"""Returns a handle where it was asked to run beside others."""


class Done:
    """The handle of a collective that is complete."""

    def wait(self, timeout: object = None) -> bool:
        """Returns at once: there was nothing to wait for."""
        return True

    def is_completed(self) -> bool:
        """True from the start."""
        return True


def install() -> None:
    """Install the shortcuts; before megatron-core is imported, which keeps references to the functions it finds."""
    dist.all_reduce = _all_reduce(dist.all_reduce)
    dist.reduce_scatter_tensor = _reduce_scatter(dist.reduce_scatter_tensor)
    dist.all_gather_into_tensor = _all_gather(dist.all_gather_into_tensor)


def _all_reduce(collective: Collective) -> Collective:
    def all_reduce(
        tensor: Tensor, op: object = dist.ReduceOp.SUM, group: Group = None, async_op: bool = False
    ) -> object:
        """Like torch's, but a single rank's tensor is already the sum."""
        if dist.get_world_size(group) == 1:
            return Done() if async_op else None
        return collective(tensor, op, group, async_op)

    return all_reduce


def _reduce_scatter(collective: Collective) -> Collective:
    def reduce_scatter_tensor(
        output: Tensor, input: Tensor, op: object = dist.ReduceOp.SUM, group: Group = None, async_op: bool = False
    ) -> object:
        """Like torch's, but a single rank's tensor is already the sum."""
        if dist.get_world_size(group) == 1:
            return _given(output, input, async_op)
        return collective(output, input, op, group, async_op)

    return reduce_scatter_tensor


def _all_gather(collective: Collective) -> Collective:
    def all_gather_into_tensor(
        output_tensor: Tensor, input_tensor: Tensor, group: Group = None, async_op: bool = False
    ) -> object:
        """Like torch's, but a single rank's tensor is already gathered."""
        if dist.get_world_size(group) == 1:
            return _given(output_tensor, input_tensor, async_op)
        return collective(output_tensor, input_tensor, group, async_op)

    return all_gather_into_tensor


def _given(output: Tensor, values: Tensor, async_op: bool) -> Done | None:
    """Copy `values` to `output`, unless they are the same memory, as in the engine's buffers."""
    same = output.untyped_storage()._cdata == values.untyped_storage()._cdata
    if not same or output.storage_offset() != values.storage_offset():
        output.copy_(values.view_as(output))
    return Done() if async_op else None
