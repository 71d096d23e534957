"""Whether what a growth added is alive: norms, updates, effective ranks and distances, for `logging.growth_health`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from flm_megatron.checkpoint.sharding.optimizer_state import StateRegion, StateSlice
from flm_megatron.device import current
from flm_megatron.growth.distance import watch_layers
from flm_megatron.growth.grown.added import AddedEntries
from flm_megatron.growth.plan import GrowthPlan
from flm_megatron.model.parameters import TARGETS, Unit, parameter_specs
from flm_megatron.training.hooks.hook import Hook
from flm_megatron.training.hooks.owned import counted_regions, layer_name
from flm_megatron.training.metrics.events import GrowthHealthEvent
from flm_megatron.training.step import StepResult, TrainState

if TYPE_CHECKING:
    from flm_megatron.training.stage import StageTrainer

COLUMNS = 64
"""Directions onto which channels, and what they read or write, are projected where they are more."""
SIDES = ("old", "new")
WIDTHS = {"hidden": Unit.HIDDEN, "ffn": Unit.FFN, "heads": Unit.HEAD}
Health = dict[str, dict[str, float]]


class MeasureGrowth(Hook):
    """Measures the first step of a grown stage and every N-th one, and writes a line of `metrics.jsonl`."""

    interval_steps = 1

    def __init__(self, plan: GrowthPlan, every: int) -> None:
        self.parts, self.every = HealthParts(plan), every
        self.step: MeasuredStep | None = None
        self.applied = False

    def before_step(self, trainer: StageTrainer) -> None:
        """Copy the masters and watch the layers, where the step is to be measured."""
        if trainer.step == 0 or (trainer.step + 1) % self.every == 0:
            self.step, self.applied = MeasuredStep(trainer.state, self.parts), False

    def after_step(self, trainer: StageTrainer, result: StepResult) -> Mapping[str, float]:
        """Remember that the step was not refused."""
        self.applied = True
        return {}

    def at_interval(self, trainer: StageTrainer) -> None:
        """Measure what the step changed, unless it was refused, and record it."""
        if self.step is None:
            return
        measured = self.step.finish(self.applied)
        self.step = None
        if trainer.log and measured:
            trainer.log.write(GrowthHealthEvent(*trainer.position(), measured))


@dataclass(frozen=True)
class Channels:
    """Channels of a matrix of every layer whose rank is measured: those along `axis` of [rows, columns].

    `projections` [2, channels, k] take the old and the new channels alone, `others` [other side, k] the other side.
    """

    target: str
    axis: int
    projections: torch.Tensor
    others: torch.Tensor

    def sketch(self, values: torch.Tensor, rows: slice, columns: slice, new_layer: bool) -> torch.Tensor:
        """What a region [rows, columns] of the matrix adds to the sketches [2, k, k] of old and of new channels."""
        channels, other = (rows, columns) if self.axis == 0 else (columns, rows)
        across = (values if self.axis == 0 else values.T) @ self.others[other]
        kept = self.projections[:, channels]
        if new_layer:  # all of it was added
            kept = torch.stack([torch.zeros_like(kept[0]), kept.sum(0)])
        return (kept.transpose(1, 2) @ across).double()


class HealthParts:
    """What is measured of a plan's model: matrices by layer, embedding and head, each divided into old and added.

    Ranks are those of the channels of the first of hidden channels, feed-forward units and heads that grows: of the
    matrices that give and take them, in every layer. Where only layers grow, hidden channels count as added in the new
    layers.
    """

    def __init__(self, plan: GrowthPlan) -> None:
        specs = parameter_specs(plan.new)
        self.num_layers = plan.new.num_layers
        self.specs = {n: s for n, s in specs.items() if s.kind in ("matrix", "embedding", "head")}
        self.added = AddedEntries(plan)
        self.names = [*map(layer_name, range(self.num_layers)), *(n for n, s in self.specs.items() if not s.stacked)]
        self.numbers = {name: index for index, name in enumerate(self.names)}
        self.new_layers = [layer.copy for layer in plan.layer_sources]
        unit = next((unit for name, unit in WIDTHS.items() if name in plan.grows), Unit.HIDDEN)
        targets: tuple[str, ...] = ("qkv", "projection") if unit is Unit.HEAD else ("fc1", "fc2")
        targets = targets if self.num_layers else ()
        self.channels = {f"{TARGETS[target]}.weight": self._channels(target, unit) for target in targets}

    def part(self, held: StateRegion) -> int:
        """Number of the part that a region belongs to."""
        layer = held.placement.layer
        return self.numbers[held.placement.name] if layer is None else layer

    def _channels(self, target: str, unit: Unit) -> Channels:
        name = f"{TARGETS[target]}.weight"
        spec = self.specs[name]
        axis = next(index for index, each in enumerate(spec.axes) if each.unit is unit)
        added = torch.tensor(self.added.indices(name, axis), device=current().torch_device)
        projection, others = _projection(len(added), 0), _projection(spec.shape[3 - axis], 1)
        return Channels(target, axis - 1, torch.stack([~added, added])[..., None] * projection, others)


class MeasuredStep:
    """One step: made before it, finished after it, on every rank.

    It holds a copy of this rank's masters of matrices, embedding and head. All sums go over the ranks in one
    all-reduce.
    """

    def __init__(self, state: TrainState, parts: HealthParts) -> None:
        self.state, self.parts = state, parts
        self.before = [held.values(owned.master).clone() for owned, held in self._measured()]
        size, device = len(parts.names), current().torch_device
        self.distances = torch.zeros(parts.num_layers, 3, dtype=torch.float64, device=device)
        self.norms = torch.zeros(size, len(SIDES), 3, dtype=torch.float64, device=device)
        self.sketches = {
            name: torch.zeros(
                (parts.num_layers, 2, each.projections.shape[2], each.others.shape[1]),
                dtype=torch.float64,
                device=device,
            )
            for name, each in parts.channels.items()
        }
        self.handles = watch_layers(state.chunks, self.distances)

    @torch.no_grad()
    def finish(self, applied: bool) -> Health:
        """Numbers by part and name, the same on every rank; none unless the step was applied.

        Of the entries of each part that are old and of those that are new: `weight_norm`, the 2-norm of the fp32
        masters; `weight_rms`, their root mean square; `update`, the norm of what the step changed over that of the
        weights after it. `rank`: effective rank (Roy and Vetterli 2007: the exponential of the entropy of the
        singular values, as shares of their sum) of the old and of the new channels of two matrices of the layer, under
        fixed random projections to 64 directions on either side where there are more: compare old with new, which
        have the same projections. `distance`: mean over the step's tokens of 1 - cos and of the relative L2 distance
        between the layer's input and output.
        """
        for handle in self.handles:
            handle.remove()
        if not applied:
            return {}
        for before, (owned, held) in zip(self.before, self._measured(), strict=True):
            self._add(before, held.values(owned.master), held)
        self._sum_over_ranks()
        return self._numbers()

    def _measured(self) -> Iterator[tuple[StateSlice, StateRegion]]:
        for owned, held in counted_regions(self.state):
            if held.placement.name in self.parts.specs:
                yield owned, held

    def _add(self, before: torch.Tensor, after: torch.Tensor, held: StateRegion) -> None:
        """Add a region's squares, and its sketches."""
        name, region, part = held.placement.name, held.region, self.parts.part(held)
        for cut, added in self.parts.added.regions(name, region):
            here = cut.within(region).slices
            weights, changed = after[here], after[here] - before[here]
            squares = [torch.linalg.vector_norm(each, dtype=torch.float64) ** 2 for each in (weights, changed)]
            self.norms[part, int(added)] += torch.stack([*squares, torch.full_like(squares[0], cut.numel)])
        channels = self.parts.channels.get(name)
        if channels is not None:
            _, rows, columns = region.slices
            new_layer = self.parts.new_layers[part]
            self.sketches[name][part] += channels.sketch(after[0], rows, columns, new_layer)

    def _sum_over_ranks(self) -> None:
        sums = [self.norms, self.distances, *self.sketches.values()]
        flat = torch.cat([each.flatten() for each in sums])
        dist.all_reduce(flat)
        for each, summed in zip(sums, flat.split([each.numel() for each in sums]), strict=True):
            each.copy_(summed.view_as(each))

    def _numbers(self) -> Health:
        health: Health = {}
        for name, sides in zip(self.parts.names, self.norms.cpu(), strict=True):
            numbers = health[name] = {}
            for side, (weights, changed, count) in zip(SIDES, sides.tolist(), strict=True):
                if count:
                    numbers[f"weight_norm_{side}"] = weights**0.5
                    numbers[f"weight_rms_{side}"] = (weights / count) ** 0.5
                    numbers[f"update_{side}"] = (changed / weights) ** 0.5 if weights else 0.0
        for name, sketches in self.sketches.items():
            ranks = effective_rank(sketches.cpu()).tolist()
            for layer, pair in enumerate(ranks):
                kept = {side: rank for side, rank in zip(SIDES, pair, strict=True) if self._has(name, layer, side)}
                target = self.parts.channels[name].target
                health[layer_name(layer)] |= {f"rank_{target}_{side}": rank for side, rank in kept.items()}
        for layer, (cosine, l2, tokens) in enumerate(self.distances.tolist()):
            health[layer_name(layer)] |= {"distance_cosine": cosine / tokens, "distance_l2": l2 / tokens}
        return health

    def _has(self, name: str, layer: int, side: str) -> bool:
        """Whether a layer's matrix has channels of this side."""
        if self.parts.new_layers[layer]:
            return side == "new"
        return bool(self.parts.channels[name].projections[SIDES.index(side)].any())


def effective_rank(matrices: torch.Tensor) -> torch.Tensor:
    """The exponential of the entropy of the singular values of matrices [..., m, n], as shares of their sum [...]; 0
    for a matrix of zeros."""
    values = torch.linalg.svdvals(matrices)
    total = values.sum(-1, keepdim=True)
    shares = values / total.clamp(min=torch.finfo(values.dtype).tiny)
    entropy = torch.special.entr(shares).sum(-1)
    return torch.where(total[..., 0] > 0, entropy.exp(), torch.zeros_like(entropy))


def _projection(size: int, seed: int) -> torch.Tensor:
    """The same [size, k] on every rank: normal values, k = COLUMNS; the identity where `size` is no larger."""
    if size <= COLUMNS:
        projection = torch.eye(size)
    else:
        projection = torch.randn((size, COLUMNS), generator=torch.Generator().manual_seed(seed))
    return projection.to(current().torch_device)
