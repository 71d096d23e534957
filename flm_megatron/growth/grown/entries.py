"""What AdamW is told of each entry of a grown model: written into its state, shard by shard, from the plans."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from flm_megatron.checkpoint.logical import LogicalCheckpoint, Region
from flm_megatron.checkpoint.sharding.optimizer_state import part_slices, placements_by_parameter, state_regions
from flm_megatron.checkpoint.sharding.placement import placements
from flm_megatron.config.schema import GrowthConfig, StageConfig
from flm_megatron.engine.optimizer import parts
from flm_megatron.engine.types import ModelChunk, Optimizer
from flm_megatron.errors import RequestError
from flm_megatron.growth.grown.added import AddedEntries
from flm_megatron.growth.grown.step_offsets import has_moments, has_step_offsets, step_offsets
from flm_megatron.growth.record import change_behind, growth_of
from flm_megatron.growth.schedule import lr_multipliers
from flm_megatron.optim.adamw import AdamW

OfRegion = Callable[[str, Region], torch.Tensor]
"""Values for a region of a parameter, of shape `region.sizes`."""


def load_entries(
    checkpoint: LogicalCheckpoint, stage: StageConfig, chunks: Sequence[ModelChunk], optimizer: Optimizer
) -> None:
    """Tell a loaded optimizer's AdamW the step offsets of all entries, and which ones learn at a rate of their own.

    Call it after `load_state`, with the same checkpoint. Where there is nothing to tell nothing is stored. Without
    moments in the checkpoint Adam starts anew, from offset 0.

    Raises:
        RequestError: a growth asks for either, but the optimizer is Transformer Engine's or Apex's.
    """
    before = change_behind(checkpoint.manifest)
    if has_moments(checkpoint) and has_step_offsets(before):
        what = "growth.optimizer_step is `birth`, which {} cannot count: use `keep` with a re-warm-up"
        _tell(chunks, optimizer, "step_offset", torch.int32, lambda *of: step_offsets(before, *of), what)
    growth, settings = growth_of(checkpoint.manifest), stage.growth or GrowthConfig()
    if growth is not None and lr_multipliers(settings, growth.plan, checkpoint.manifest.position.step or 0)[1] != 1:
        what = "growth.new_lr_mult is given, but {} has one learning rate for old and new entries: use growth.lr_mult"
        _tell(chunks, optimizer, "added", torch.bool, AddedEntries(growth.plan).flags, what)


def set_added_lr_mult(optimizer: Optimizer, factor: float) -> None:
    """Let the next update of added entries be at `factor` times the learning rate of the others."""
    for part in parts(optimizer):
        if isinstance(part.optimizer, AdamW):
            part.optimizer.added_lr_mult = factor


def _tell(
    chunks: Sequence[ModelChunk], optimizer: Optimizer, key: str, dtype: torch.dtype, of_region: OfRegion, what: str
) -> None:
    """Store values of each entry under `key` in the state of parameters for which any is not 0."""
    by_parameter = placements_by_parameter(placements(chunks))
    for part in parts(optimizer):
        inner = part.optimizer
        if not isinstance(inner, AdamW):
            kind = f"{type(inner).__module__}.{type(inner).__name__}"
            raise RequestError(f"{what.format(kind)}, or train without Transformer Engine and Apex")
        masters = {_memory(p): p for group in inner.param_groups for p in group["params"] if p.numel()}
        for state in part_slices(part):
            values = torch.zeros(state.master.shape, dtype=dtype)
            for held in state_regions(state, by_parameter):
                held.values(values).copy_(of_region(held.placement.name, held.region))
            if values.any():
                master = masters[_memory(state.master)]
                inner.state[master][key] = values.view(master.shape).to(master.device)


def _memory(tensor: torch.Tensor) -> tuple[int, int]:
    """What tells where a tensor's values are, whether it has values or not."""
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset())
