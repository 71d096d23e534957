"""Norms of weights and gradients of each layer, for `logging.layer_norms`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from flm_megatron.checkpoint.sharding.placement import Placement
from flm_megatron.device import current
from flm_megatron.engine.types import Optimizer
from flm_megatron.model.parameters import parameter_specs
from flm_megatron.training.hooks.hook import Hook
from flm_megatron.training.hooks.owned import counted_regions, layer_name
from flm_megatron.training.step import StepResult, TrainState

if TYPE_CHECKING:
    from flm_megatron.training.stage import StageTrainer


class LayerNorms(Hook):
    """Logs the norms with every step."""

    def after_step(self, trainer: StageTrainer, result: StepResult) -> Mapping[str, float]:
        """See `layer_norms`."""
        return layer_norms(trainer.state)


@torch.no_grad()
def layer_norms(state: TrainState) -> dict[str, float]:
    """2-norms after a step, over all ranks: `weight_norm/PART` and `grad_norm/PART` for every part of the model.

    Parts are the layers (`layer_000` ...) and the logical tensors outside them. Weights are the fp32 masters,
    gradients those that the optimizer took, after clipping. Each rank adds up what it owns; nothing is gathered.
    """
    parts = _parts(state)
    numbers = {part: index for index, part in enumerate(parts)}
    sums = torch.zeros(len(parts), 2, dtype=torch.float64, device=current().torch_device)
    for part, weight, gradient in _owned(state):
        sums[numbers[part], 0] += weight.double().square().sum()
        sums[numbers[part], 1] += gradient.double().square().sum()
    dist.all_reduce(sums)
    norms = sums.sqrt().tolist()
    kinds = ("weight_norm", "grad_norm")
    return {f"{kind}/{part}": norms[numbers[part]][column] for column, kind in enumerate(kinds) for part in parts}


def _parts(state: TrainState) -> list[str]:
    model = state.stage.model
    outside = [spec.name for spec in parameter_specs(model).values() if not spec.stacked]
    return [*map(layer_name, range(model.num_layers)), *outside]


def _owned(state: TrainState) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Name, masters and gradients of every region that this rank owns and has to count."""
    gradients = _gradients(state.optimizer)
    for owned, held in counted_regions(state):
        flat = gradients[owned.master.data_ptr()].view(-1)
        yield _part(held.placement), held.values(owned.master), held.values(flat)


def _gradients(optimizer: Optimizer) -> dict[int, torch.Tensor]:
    """Gradients by the address of their masters."""
    masters = [master for group in optimizer.param_groups for master in group["params"]]
    return {master.data_ptr(): master.grad for master in masters if master.grad is not None}


def _part(placement: Placement) -> str:
    return placement.name if placement.layer is None else layer_name(placement.layer)
