"""Optimizer state as regions of logical tensors: what each process owns, without any gather."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from flm_megatron.checkpoint.logical import Region
from flm_megatron.checkpoint.regions import flat_regions
from flm_megatron.checkpoint.sharding.placement import Placement


@dataclass(frozen=True)
class StateSlice:
    """Values `start` to `end` of a local parameter, flat and row-major, with the fp32 master and moments of these.

    `sharded` says that the other data-parallel ranks own other ranges; otherwise they hold the same.
    """

    parameter: torch.nn.Parameter
    start: int
    end: int
    sharded: bool
    master: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor


@dataclass(frozen=True)
class StateRegion:
    """A region of the logical tensor of `placement`; its values begin at `start` of a slice."""

    placement: Placement
    region: Region
    start: int

    def values(self, flat: torch.Tensor) -> torch.Tensor:
        """View of a slice's flat master or moment, of shape `region.sizes`."""
        return flat[self.start : self.start + self.region.numel].view(self.region.sizes)


def unchained(optimizer: Any) -> list[Any]:
    """The optimizers in megatron-core's ChainedOptimizer, without those that own no parameters."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in parts if not getattr(part, "is_stub_optimizer", False)]


def initialise_state(optimizer: Any) -> None:
    """Make the moments exist (zero) where no step has been taken yet."""
    for part in unchained(optimizer):
        part.init_state_fn(part.optimizer, part.config)


def state_slices(optimizer: Any) -> Iterator[StateSlice]:
    """Optimizer state that this process owns; its moments must exist."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    for part in unchained(optimizer):
        if isinstance(part, DistributedOptimizer):
            yield from _distributed(part)
        else:
            yield from _replicated(part)


def state_regions(state: StateSlice, by_parameter: dict[int, list[Placement]]) -> Iterator[StateRegion]:
    """Regions that cover a slice but for padding rows: at most three for each placement of a matrix.

    `by_parameter` is `placements_by_parameter`'s.
    """
    shape = tuple(state.parameter.shape)
    for covered in flat_regions(shape, state.start, state.end):
        for placement in by_parameter[id(state.parameter)]:
            held = covered.intersect(placement.local)
            if held is None:
                continue
            inside = held.within(placement.local)
            layers = len(placement.region.offsets) - len(shape)
            corner = (0,) * layers + inside.offsets
            offsets = tuple(a + b for a, b in zip(placement.region.offsets, corner, strict=True))
            start = sum(o * math.prod(shape[i + 1 :]) for i, o in enumerate(held.offsets)) - state.start
            yield StateRegion(placement, Region(offsets, (1,) * layers + held.sizes), start)


def placements_by_parameter(parts: Iterable[Placement]) -> dict[int, list[Placement]]:
    """Placements by the `id` of their parameter (a gated matrix has two; one of padding rows only has none)."""
    table: dict[int, list[Placement]] = defaultdict(list)
    for placement in parts:
        table[id(placement.parameter)].append(placement)
    return table


def _distributed(optimizer: Any) -> Iterator[StateSlice]:
    """Ranges of the data-parallel buffers, as megatron-core's DistributedOptimizer has divided them."""
    for buffer in optimizer.gbuf_ranges:
        for buckets in buffer.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    owned = ranges["param"]
                    state = optimizer._get_main_param_and_optimizer_states(parameter)
                    yield _slice(parameter, owned.start, owned.end, True, state)


def _replicated(optimizer: Any) -> Iterator[StateSlice]:
    """Whole parameters: the fp32 optimizer's own, the mixed-precision optimizer's fp32 copies."""
    inner = optimizer.optimizer
    pairs = [
        pair
        for copied, copies in zip(
            getattr(optimizer, "float16_groups", []), getattr(optimizer, "fp32_from_float16_groups", []), strict=True
        )
        for pair in zip(copied, copies, strict=True)
    ]
    copies = {id(copy) for _, copy in pairs}
    pairs += [(p, p) for group in inner.param_groups for p in group["params"] if id(p) not in copies]
    for parameter, master in pairs:
        yield _slice(parameter, 0, parameter.numel(), False, {"param": master, **inner.state[master]})


def _slice(parameter: Any, start: int, end: int, sharded: bool, state: dict[str, torch.Tensor]) -> StateSlice:
    master, exp_avg, exp_avg_sq = (state[key].detach().view(-1) for key in ("param", "exp_avg", "exp_avg_sq"))
    assert master.dtype == exp_avg.dtype == exp_avg_sq.dtype == torch.float32, "optimizer state is kept in fp32"
    assert master.numel() == end - start, f"{master.numel()} values for the range {start} to {end}"
    return StateSlice(parameter, start, end, sharded, master, exp_avg, exp_avg_sq)
