"""Growth masks: opened step by step, and removed when they are fully open."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flm_megatron.growth.plan import GrowthPlan
from flm_megatron.growth.schedule import mask_plan, mask_value
from flm_megatron.model.masks import GrowthMasks
from flm_megatron.training.hooks.hook import Hook

if TYPE_CHECKING:
    from flm_megatron.training.stage import StageTrainer


class OpenMasks(Hook):
    """Opens the masks of the growth that the stage began with."""

    def __init__(self, plan: GrowthPlan) -> None:
        self.plan = plan
        self.masks: GrowthMasks | None = None

    def on_start(self, trainer: StageTrainer) -> None:
        """Install the masks unless they are open already."""
        if self.plan.masked and mask_value(self.plan, trainer.step) < 1:
            self.masks = GrowthMasks(trainer.state.chunks, trainer.stage.model, mask_plan(self.plan))

    def before_step(self, trainer: StageTrainer) -> None:
        """Set them to this step's value; at 1 they are removed."""
        if self.masks is None:
            return
        self.masks.set(mask_value(self.plan, trainer.step))
        if not self.masks.installed:
            self.masks = None
