"""The interface of all checkpoints: a set of logical tensors, of which any region can be read."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from flm_megatron.checkpoint.manifest import Manifest
from flm_megatron.errors import RequestError

MASTER = "optimizer.state.param."
EXP_AVG = "optimizer.state.exp_avg."
EXP_AVG_SQ = "optimizer.state.exp_avg_sq."
STATE_PREFIXES = (MASTER, EXP_AVG, EXP_AVG_SQ)


def split_name(name: str) -> tuple[str, str]:
    """A tensor's optimizer prefix (empty for a weight) and its parameter."""
    prefix = next((prefix for prefix in STATE_PREFIXES if name.startswith(prefix)), "")
    return prefix, name[len(prefix) :]


@dataclass(frozen=True)
class Region:
    """A box of a logical tensor: its first index and size along each axis."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> Region:
        """All of a tensor of `shape`."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def numel(self) -> int:
        """Number of values."""
        return math.prod(self.sizes)

    @property
    def slices(self) -> tuple[slice, ...]:
        """Index of the region in the whole tensor."""
        return tuple(slice(o, o + n) for o, n in zip(self.offsets, self.sizes, strict=True))

    def intersect(self, other: Region) -> Region | None:
        """The overlap with `other`; none if there is none."""
        starts, sizes = [], []
        for a, n, b, m in zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True):
            start = max(a, b)
            size = min(a + n, b + m) - start
            if size <= 0:
                return None
            starts.append(start)
            sizes.append(size)
        return Region(tuple(starts), tuple(sizes))

    def within(self, outer: Region) -> Region:
        """The same region, counted from the corner of `outer`."""
        return Region(tuple(a - b for a, b in zip(self.offsets, outer.offsets, strict=True)), self.sizes)


@dataclass(frozen=True)
class TensorInfo:
    """Global shape and stored dtype of a logical tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class LogicalCheckpoint(ABC):
    """A set of logical tensors and their description.

    Names are those of `model.parameters.parameter_specs`; optimizer state has the same names after the prefixes
    `optimizer.state.param.` (fp32 masters), `optimizer.state.exp_avg.` and `optimizer.state.exp_avg_sq.`.

    `manifest` describes it; it is empty if nothing is known.
    """

    manifest: Manifest
    tensors: Mapping[str, TensorInfo]

    @abstractmethod
    def read(self, name: str, region: Region | None = None) -> torch.Tensor:
        """Values of `region` (all of the tensor without one) of shape `region.sizes`, in the stored dtype.

        Only that region is read or computed. Several threads may read at once. Raises RequestError for a tensor
        that is not there and DamagedError for one that cannot be read, naming it.
        """

    def has_optimizer(self) -> bool:
        """Whether it has masters and moments."""
        return any(name.startswith(EXP_AVG) for name in self.tensors)


def adam_step(checkpoint: LogicalCheckpoint) -> int:
    """Adam's step at which a checkpoint's moments were saved; 0 if it has none.

    Raises:
        RequestError: it has moments and does not say after how many steps; or raised by `has_optimizer`.
    """
    if not checkpoint.has_optimizer():
        return 0
    step = checkpoint.manifest.position.optimizer_step
    if step is None:
        raise RequestError(
            "the checkpoint has Adam's moments but does not say after how many steps, which their bias correction"
            " needs: copy its weights alone with `flm checkpoint reshard --no-optimizer`, and start from these"
        )
    return step
