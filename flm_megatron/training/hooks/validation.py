"""Validation loss, over the same samples in every stage and layout."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flm_megatron.data.streams.loader import validation_batches
from flm_megatron.data.streams.stage_streams import validation_streams_of
from flm_megatron.training.hooks.hook import Hook
from flm_megatron.training.metrics.events import ValidationEvent

if TYPE_CHECKING:
    from flm_megatron.data.streams.stage_streams import Stream
    from flm_megatron.training.stage import StageTrainer


class Validation(Hook):
    """Validates at an interval and at the end of the stage."""

    def __init__(self, trainer: StageTrainer) -> None:
        self.interval_steps = trainer.stage.validation.interval_steps
        self.streams = validation_streams_of(trainer.run)
        self.measured_step = -1

    def at_interval(self, trainer: StageTrainer) -> None:
        """Measure and report the loss of each set, and their mean."""
        if not self.streams:
            return
        with trainer.meter.stall("validation"):
            losses = {name: _loss(trainer, stream) for name, stream in self.streams.items()}
        self.measured_step = trainer.step
        mean = sum(losses.values()) / len(losses)
        if trainer.log:
            trainer.log.write(ValidationEvent(*trainer.position(), loss=mean, by_set=losses))
            parts = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
            trainer.log.say(f"{trainer.stage.name} step {trainer.step} | validation loss {mean:.4f} ({parts})")

    def on_end(self, trainer: StageTrainer, finished: bool) -> None:
        """Validate after the last step whatever the interval."""
        if finished and self.measured_step != trainer.step:
            self.at_interval(trainer)


def _loss(trainer: StageTrainer, stream: Stream) -> float:
    stage = trainer.stage
    sizes = (stage.global_batch, stage.micro_batch, trainer.data_rank, trainer.data_size)
    return trainer.state.validation_loss(validation_batches(stream, stage.validation.samples, *sizes))
