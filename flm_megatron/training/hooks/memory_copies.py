"""The state is kept in the memory of hosts at an interval."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flm_megatron.training.hooks.hook import Hook

if TYPE_CHECKING:
    from flm_megatron.training.resume.memory_copies import MemoryCopies
    from flm_megatron.training.stage import StageTrainer


class CopyToMemory(Hook):
    """Copies of what is trained, and its metrics on the disk, which may outlive this host."""

    def __init__(self, copies: MemoryCopies) -> None:
        self.copies, self.interval_steps = copies, copies.interval_steps

    def on_start(self, trainer: StageTrainer) -> None:
        """Have the hosts set memory aside."""
        self.copies.reserve(trainer.state.chunks, trainer.state.optimizer)

    def at_interval(self, trainer: StageTrainer) -> None:
        """Keep this step; the last one is saved on the disk instead."""
        if trainer.step >= trainer.budget.steps:
            return
        with trainer.meter.stall("copy"):
            if trainer.log:
                trainer.log.sync()
            line = self.copies.refresh(trainer.state.chunks, trainer.state.optimizer, trainer.manifest())
        if line and trainer.log:
            trainer.log.say(line)
