"""Growth masks: opened step by step, and removed when they are fully open."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from flm_megatron.growth.opening import OpeningMasks
from flm_megatron.growth.plan import GrowthPlan
from flm_megatron.growth.schedule import all_masks
from flm_megatron.model.masks import GrowthMasks
from flm_megatron.training.hooks.hook import Hook
from flm_megatron.training.metrics.events import MASK

if TYPE_CHECKING:
    from flm_megatron.training.stage import StageTrainer
    from flm_megatron.training.step import StepResult


class OpenMasks(Hook):
    """Opens the masks of the growth that the stage began with, and those that it began with half open."""

    def __init__(self, plan: GrowthPlan) -> None:
        self.plan = plan
        self.masks: list[tuple[OpeningMasks, GrowthMasks]] = []
        self.least = 1.0

    def on_start(self, trainer: StageTrainer) -> None:
        """Install the masks unless they are open already."""
        self.masks = [
            (opening, GrowthMasks(trainer.state.chunks, trainer.stage.model, opening.masks))
            for opening in all_masks(self.plan)
            if opening.value(trainer.step) < 1
        ]

    def before_step(self, trainer: StageTrainer) -> None:
        """Set them to this step's values; at 1 they are removed."""
        self.least = min((opening.value(trainer.step) for opening, _ in self.masks), default=1.0)
        for opening, masks in self.masks:
            masks.set(opening.value(trainer.step))
        self.masks = [(opening, masks) for opening, masks in self.masks if masks.installed]

    def after_step(self, trainer: StageTrainer, result: StepResult) -> Mapping[str, float]:
        """How far the masks that are least open were open in the step, until they are."""
        return {MASK: self.least} if self.least < 1 else {}
