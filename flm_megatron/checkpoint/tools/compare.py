"""How far two checkpoints differ, tensor by tensor, over any two formats."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from flm_megatron.checkpoint.logical import STATE_PREFIXES, LogicalCheckpoint, Region
from flm_megatron.checkpoint.regions import split_region
from flm_megatron.distributed.processes import Processes
from flm_megatron.errors import RequestError

CHUNK_VALUES = 2 * 2**20


@dataclass(frozen=True)
class Difference:
    """Largest absolute difference of a tensor's values, and the same over the largest magnitude in the first one.

    Equal values, infinities and NaN at the same place among them, do not differ; a NaN on one side is infinite.
    """

    absolute: float
    relative: float


@dataclass(frozen=True)
class Comparison:
    """Differences of the tensors that both have, and names that only one has."""

    differences: dict[str, Difference]
    only_first: list[str]
    only_second: list[str]

    def beyond(self, tolerance: float) -> list[str]:
        """Tensors whose relative difference exceeds `tolerance`, and weights that only one has.

        Optimizer state that one of the two lacks altogether is no difference.
        """
        far = [name for name, difference in self.differences.items() if not difference.relative <= tolerance]
        state_on_both = any(name.startswith(STATE_PREFIXES) for name in self.differences)
        lonely = [n for n in self.only_first + self.only_second if state_on_both or not n.startswith(STATE_PREFIXES)]
        return far + lonely


def compare(
    first: LogicalCheckpoint, second: LogicalCheckpoint, processes: Processes, moved: Callable[[int], None]
) -> Comparison:
    """Compare all tensors, divided over the processes; every rank gets the result.

    `moved` is called with the bytes read of the first. Raises RequestError for a tensor whose shapes differ.
    """
    common = [name for name in first.tensors if name in second.tensors]
    for name in common:
        if tuple(first.tensors[name].shape) != tuple(second.tensors[name].shape):
            raise RequestError(f"{name}: shapes {first.tensors[name].shape} and {second.tensors[name].shape} differ")
    chunks = [
        (name, region)
        for name in common
        for region in split_region(Region.whole(first.tensors[name].shape), CHUNK_VALUES)
    ]

    def own_differences() -> dict[str, tuple[float, float]]:
        """Largest difference and magnitude of each tensor among this process's chunks."""
        found: dict[str, tuple[float, float]] = {}
        for name, region in chunks[processes.rank :: processes.size]:
            before = found.get(name, (0.0, 0.0))
            found[name] = tuple(map(max, before, _largest(first, second, name, region, moved)))  # type: ignore[assignment]
        return found

    by_rank = processes.together(own_differences)
    return processes.on_first(
        lambda: Comparison(
            {name: _difference([own[name] for own in by_rank if name in own]) for name in common},
            [name for name in first.tensors if name not in second.tensors],
            [name for name in second.tensors if name not in first.tensors],
        )
    )


def _largest(
    first: LogicalCheckpoint, second: LogicalCheckpoint, name: str, region: Region, moved: Callable[[int], None]
) -> tuple[float, float]:
    """Largest absolute difference and largest finite magnitude in the first, of one region."""
    a, b = first.read(name, region), second.read(name, region)
    moved(a.nbytes)
    if not a.numel():
        return 0.0, 0.0
    a, b = a.double(), b.double()
    same = (a == b) | (a.isnan() & b.isnan())
    apart = (a - b).abs().nan_to_num(nan=math.inf).masked_fill(same, 0.0)
    return apart.max().item(), a.abs().nan_to_num(nan=0.0, posinf=0.0).max().item()


def _difference(by_rank: list[tuple[float, float]]) -> Difference:
    absolute = max((own[0] for own in by_rank), default=0.0)
    magnitude = max((own[1] for own in by_rank), default=0.0)
    if absolute == 0:
        return Difference(0.0, 0.0)
    return Difference(absolute, absolute / magnitude if magnitude else math.inf)
