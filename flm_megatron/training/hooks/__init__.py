"""Hooks called between the steps of a stage: one file each, and those of the user.

`Hook` is their base class; `stage_hooks` gives those of a stage in the order in which they are called.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from flm_megatron.training.hooks.hook import Hook, load_hook

if TYPE_CHECKING:
    from flm_megatron.training.resume.memory_copies import MemoryCopies
    from flm_megatron.training.stage import StageTrainer

__all__ = ["Hook", "load_hook", "stage_hooks"]


def stage_hooks(trainer: StageTrainer, copies: MemoryCopies | None, more: Sequence[Hook] = ()) -> list[Hook]:
    """The hooks that this stage needs, `more` of a room above, then those of the run file; saving and copying come
    after all that only read."""
    from flm_megatron.training.hooks.growth_health import MeasureGrowth
    from flm_megatron.training.hooks.layer_norms import LayerNorms
    from flm_megatron.training.hooks.layer_statistics import LayerStatistics
    from flm_megatron.training.hooks.masks import OpenMasks
    from flm_megatron.training.hooks.memory_copies import CopyToMemory
    from flm_megatron.training.hooks.replicas import CompareReplicas
    from flm_megatron.training.hooks.validation import Validation

    stage = trainer.stage
    hooks: list[Hook] = []
    if trainer.plan is not None:
        hooks.append(OpenMasks(trainer.plan))
        if trainer.run.logging.growth_health:
            hooks.append(MeasureGrowth(trainer.plan, trainer.run.logging.growth_health))
    if stage.stability.checksum_interval_steps:
        hooks.append(CompareReplicas(stage.stability.checksum_interval_steps, copies))
    if trainer.run.logging.layer_norms:
        hooks.append(LayerNorms())
    if trainer.run.logging.layer_statistics:
        hooks.append(LayerStatistics(trainer.run.logging.layer_statistics))
    if stage.validation.samples:
        hooks.append(Validation(trainer))
    hooks += more
    hooks += [load_hook(path)() for path in trainer.run.hooks]
    hooks.append(trainer.saving)
    if copies:
        hooks.append(CopyToMemory(copies))
    return hooks
