"""Root mean square and largest magnitude of each layer's weights and output, for `logging.layer_statistics`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from flm_megatron.device import current
from flm_megatron.training.hooks.hook import Hook
from flm_megatron.training.hooks.owned import counted_regions, layer_name
from flm_megatron.training.step import StepResult, TrainState

if TYPE_CHECKING:
    from flm_megatron.engine.transformer import TransformerLayer
    from flm_megatron.training.stage import StageTrainer

KINDS = ("weight", "activation")


class LayerStatistics(Hook):
    """Measures every N-th step, and records the numbers with it; between those steps nothing is hooked."""

    interval_steps = 1

    def __init__(self, every: int) -> None:
        self.every = every
        self.step: WatchedStep | None = None

    def before_step(self, trainer: StageTrainer) -> None:
        """Watch the layers, where the step is to be measured."""
        if (trainer.step + 1) % self.every == 0:
            self.step = WatchedStep(trainer.state)

    def after_step(self, trainer: StageTrainer, result: StepResult) -> Mapping[str, float]:
        """See `WatchedStep.finish`."""
        return self.step.finish() if self.step else {}

    def at_interval(self, trainer: StageTrainer) -> None:
        """Stop watching, also after a step that was refused."""
        if self.step:
            self.step.stop()
            self.step = None


class WatchedStep:
    """One step: made before it, finished after it, on every rank."""

    def __init__(self, state: TrainState) -> None:
        from flm_megatron.engine.transformer import TransformerLayer

        self.state = state
        size = (state.stage.model.num_layers, len(KINDS))
        device = current().torch_device
        self.sums = torch.zeros(*size, 2, dtype=torch.float64, device=device)
        """[layers, kinds, (squares, entries)]"""
        self.largest = torch.zeros(size, dtype=torch.float64, device=device)
        layers = [part for chunk in state.chunks for part in chunk.modules() if isinstance(part, TransformerLayer)]
        self.handles = [layer.register_forward_hook(self._watch) for layer in layers]

    def stop(self) -> None:
        """Watch no more."""
        for handle in self.handles:
            handle.remove()
        self.handles = []

    @torch.no_grad()
    def finish(self) -> dict[str, float]:
        """`weight_rms/LAYER` and `weight_max/LAYER` of the fp32 masters after the step, `activation_rms/LAYER` and
        `activation_max/LAYER` of what the layer gave over all the step's tokens; the same on every rank.

        Layers of which nothing is trained have no weights here.
        """
        self.stop()
        for owned, held in counted_regions(self.state):
            if held.placement.layer is not None:
                self._add(held.placement.layer, "weight", held.values(owned.master))
        # What several ranks hold alike is counted by each of them, in the squares and in the entries.
        dist.all_reduce(self.sums)
        dist.all_reduce(self.largest, op=dist.ReduceOp.MAX)
        return _numbers(self.sums.tolist(), self.largest.tolist())

    def _watch(self, layer: TransformerLayer, args: object, output: tuple[torch.Tensor, ...]) -> None:
        """Add what a layer gave for a micro-batch."""
        self._add(layer.layer_number - 1, "activation", output[0].detach())

    def _add(self, layer: int, kind: str, values: torch.Tensor) -> None:
        if not values.numel():
            return
        column = KINDS.index(kind)
        squares = torch.linalg.vector_norm(values, dtype=torch.float64) ** 2
        self.sums[layer, column] += torch.stack([squares, torch.full_like(squares, values.numel())])
        self.largest[layer, column] = torch.maximum(self.largest[layer, column], values.abs().max().double())


def _numbers(sums: list[list[list[float]]], largest: list[list[float]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for column, kind in enumerate(KINDS):
        for layer, (kinds, most) in enumerate(zip(sums, largest, strict=True)):
            squares, entries = kinds[column]
            if entries:
                found[f"{kind}_rms/{layer_name(layer)}"] = (squares / entries) ** 0.5
                found[f"{kind}_max/{layer_name(layer)}"] = most[column]
    return found
