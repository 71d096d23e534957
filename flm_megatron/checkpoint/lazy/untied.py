"""A checkpoint whose embedding is the head too, read as two matrices of equal values."""

from __future__ import annotations

import torch

from flm_megatron.checkpoint.logical import MASTER, LogicalCheckpoint, Region
from flm_megatron.model.parameters import EMBEDDING, HEAD


class UntiedCheckpoint(LogicalCheckpoint):
    """`source`, of a model with `tie_embeddings`, for a model without: weights (and masters) of the head are the
    embedding's, moments are none, which start at zero."""

    def __init__(self, source: LogicalCheckpoint) -> None:
        self.source, self.manifest = source, source.manifest
        copies = {f"{prefix}{HEAD}": f"{prefix}{EMBEDDING}" for prefix in ("", MASTER)}
        self._copies = {name: like for name, like in copies.items() if like in source.tensors}
        self.tensors = {**source.tensors, **{name: source.tensors[like] for name, like in self._copies.items()}}

    def read(self, name: str, region: Region | None = None) -> torch.Tensor:
        """Values of `region` of shape `region.sizes`; see `LogicalCheckpoint.read`."""
        return self.source.read(self._copies.get(name, name), region)

    def has_optimizer(self) -> bool:
        """Whether masters and moments are there; raises whatever the source raises."""
        return self.source.has_optimizer()
