"""A checkpoint in another dtype, without its optimizer, or with a factor on some tensors and a number added."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from flm_megatron.checkpoint.logical import (
    MASTER,
    STATE_PREFIXES,
    LogicalCheckpoint,
    Region,
    TensorInfo,
)
from flm_megatron.errors import RequestError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Dtypes of weights by their option names."""


def dtype_named(name: str | None) -> torch.dtype | None:
    """The dtype of that name; none keeps the stored one. Raises RequestError for an unknown name."""
    if name is not None and name not in DTYPES:
        raise RequestError(f"dtype {name!r} is not one of {', '.join(DTYPES)}")
    return DTYPES[name] if name is not None else None


class ConvertedCheckpoint(LogicalCheckpoint):
    """`source` with its weights in `dtype` (none keeps theirs), `factors` on the weights of those names, and `offsets`
    added to them then.

    For a wider dtype or other values, these come from the fp32 master if there is one and are rounded once. Factors and
    offsets apply to weights alone, so with them the optimizer state is left out.
    """

    def __init__(
        self,
        source: LogicalCheckpoint,
        dtype: torch.dtype | None = None,
        factors: Mapping[str, float] | None = None,
        optimizer: bool = True,
        offsets: Mapping[str, float] | None = None,
    ) -> None:
        assert not ((factors or offsets) and optimizer), "the optimizer's state would not fit changed weights"
        self.source, self.dtype = source, dtype
        self.factors = {name: factor for name, factor in (factors or {}).items() if factor != 1.0}
        self.offsets = offsets or {}
        self.manifest = source.manifest
        self.tensors = {name: self._info(name) for name in source.tensors if optimizer or not _is_state(name)}

    def read(self, name: str, region: Region | None = None) -> torch.Tensor:
        """Values of `region` of shape `region.sizes`; see `LogicalCheckpoint.read`."""
        dtype = self._info(name).dtype
        factor, offset = self.factors.get(name, 1.0), self.offsets.get(name, 0.0)
        changed = factor != 1.0 or offset != 0.0
        if not changed and dtype == self.source.tensors[name].dtype:
            return self.source.read(name, region)
        master = MASTER + name
        values = self.source.read(master if master in self.source.tensors else name, region)
        if changed:
            values = values.float() * factor + offset
        return values.to(dtype)

    def _info(self, name: str) -> TensorInfo:
        info = self.source.tensors[name]
        return info if self.dtype is None or _is_state(name) else TensorInfo(info.shape, self.dtype)


def is_power_of_two(factor: float) -> bool:
    """Whether multiplying by `factor` is exact in binary floating point (short of overflow and underflow)."""
    return factor > 0 and math.frexp(factor)[0] == 0.5


def _is_state(name: str) -> bool:
    return name.startswith(STATE_PREFIXES)
