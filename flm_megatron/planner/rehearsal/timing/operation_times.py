"""Seconds of an operation on an accelerator, by the planner's cost model: products by their shapes, attention by its
arithmetic, everything else by the bytes that it reads and writes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch.utils._pytree import tree_leaves

from flm_megatron.device.hardware import Precision
from flm_megatron.planner.cost.communication import group_time, transfer_time
from flm_megatron.planner.cost.matmul import attention_time, matmul_time, memory_time
from flm_megatron.planner.machine import Machine

WorkKind = Literal["matmul", "attention", "memory_bound"]
aten = torch.ops.aten
FACTORS: Mapping[object, int] = {
    aten.mm: 0,
    aten.bmm: 0,
    aten.addmm: 1,
    aten.addmm_: 1,
    aten.baddbmm: 1,
    aten._scaled_mm: 0,
}
"""Matrix products, and where among their arguments the two factors stand."""
PRECISIONS: Mapping[torch.dtype, Precision] = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float8_e4m3fn: "fp8",
    torch.float8_e5m2: "fp8",
}
"""Precisions of products; all others are of fp32."""
FREE = ("empty", "empty_like", "empty_strided", "new_empty", "_unsafe_view", "lift_fresh", "_local_scalar_dense")
"""Operations that run no kernel, besides views."""
OVERWRITES = ("copy_", "zero_", "fill_")
"""Operations that do not read what they write to."""
ALL_REDUCE = 2
"""Rings of an all-reduce: a reduce-scatter and an all-gather."""


@dataclass(frozen=True)
class OperationTimes:
    """Seconds on one accelerator of a machine."""

    machine: Machine

    def product(self, factors: Sequence[torch.Tensor]) -> float:
        """A product [..., rows, inner] x [..., inner, columns] in the precision of its factors."""
        left, right = factors
        batch = left.shape[0] if left.dim() == 3 else 1
        return matmul_time(self.machine, _precision(left), left.shape[-2], right.shape[-1], left.shape[-1], batch)

    def adding(self, out: torch.Tensor, factor: torch.Tensor) -> float:
        """What a product of `factor` that is added to a wider `out` moves more than one of its own width."""
        return memory_time(self.machine, out.numel() * (2 * out.element_size() - factor.element_size()))

    def attention(self, query: torch.Tensor, key: torch.Tensor, flops: int, causal: bool) -> float:
        """Flash attention of `query` and `key` [..., positions, channels], whose products are `flops` over all keys.

        Causality leaves half of as many keys as queries; fewer keys are a sliding window's, which leaves all but half
        of its first queries' (`model.attention.window`).
        """
        left = 1 - key.size(-2) / (2 * query.size(-2)) if causal else 1.0
        return attention_time(self.machine, _precision(query), flops * left)

    def memory_bound(self, tensors: Iterable[torch.Tensor]) -> float:
        """A kernel that reads or writes each of some tensors once."""
        return memory_time(self.machine, sum(tensor.nbytes for tensor in tensors))

    def operation(self, func: torch._ops.OpOverload, args: tuple[object, ...], out: object) -> float:
        """An operation of torch that is neither product nor attention."""
        if func.is_view or func.namespace != "aten" or func._opname in FREE:
            return 0.0
        return self.memory_bound(_moved(func, args, out))

    def collective(self, kind: str, nbytes: int, group: Sequence[int]) -> float:
        """A collective over the global ranks `group` of a tensor that is `nbytes` whole."""
        rings = ALL_REDUCE if kind == "all-reduce" else 1
        return rings * group_time(self.machine, nbytes, group)

    def transfer(self, nbytes: int, sender: int, receiver: int) -> float:
        """A transfer from one global rank to another."""
        same_node = sender // self.machine.node_size == receiver // self.machine.node_size
        return transfer_time(self.machine, nbytes, same_node)


def _moved(func: torch._ops.OpOverload, args: tuple[object, ...], out: object) -> Iterator[torch.Tensor]:
    """Tensors that an operation reads or writes; twice those that it does both with."""
    written = {
        id(tensor)
        for value, argument in zip(args, func._schema.arguments, strict=False)
        if argument.alias_info is not None and argument.alias_info.is_write
        for tensor in tensors_in(value)
    }
    inputs = list(tensors_in(args))
    for tensor in inputs:
        if id(tensor) not in written or func._opname not in OVERWRITES:
            yield tensor
        if id(tensor) in written:
            yield tensor
    known = {tensor.untyped_storage()._cdata for tensor in inputs}
    yield from (tensor for tensor in tensors_in(out) if tensor.untyped_storage()._cdata not in known)


def tensors_in(tree: object) -> Iterator[torch.Tensor]:
    """The tensors among an operation's arguments or results, however nested."""
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))


def _precision(tensor: torch.Tensor) -> Precision:
    return PRECISIONS.get(tensor.dtype, "fp32")
