"""Copies the state into the hosts' memory at an interval."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flm_megatron.training.hooks.hook import Hook

if TYPE_CHECKING:
    from flm_megatron.training.resume.memory_copies import MemoryCopies
    from flm_megatron.training.stage import StageTrainer


class CopyToMemory(Hook):
    """Copies model and optimizer to the host agents, and syncs the metrics to disk, which may outlive this host."""

    def __init__(self, copies: MemoryCopies) -> None:
        self.copies, self.interval_steps = copies, copies.interval_steps

    def on_start(self, trainer: StageTrainer) -> None:
        """Reserve the memory on the hosts."""
        self.copies.reserve(trainer.state.chunks, trainer.state.optimizer)

    def at_interval(self, trainer: StageTrainer) -> None:
        """Copy the state of this step; the last step is saved to disk instead."""
        if trainer.step >= trainer.budget.steps:
            return
        with trainer.meter.stall("copy"):
            if trainer.log:
                trainer.log.sync()
            line = self.copies.refresh(trainer.state.chunks, trainer.state.optimizer, trainer.manifest())
        if line and trainer.log:
            trainer.log.say(line)
