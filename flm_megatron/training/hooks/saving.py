"""Saves the checkpoints of a stage."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flm_megatron.checkpoint.sharding.model_state import SaveHandle, prepare_asynchronous_save, save_state
from flm_megatron.distributed.world import is_main_rank
from flm_megatron.training.hooks.hook import Hook
from flm_megatron.training.metrics.events import SaveEvent
from flm_megatron.training.resume.start import checkpoint_store

if TYPE_CHECKING:
    from flm_megatron.training.stage import StageTrainer


class Saving(Hook):
    """Saves at an interval and at the end. `pending` is the save in progress, `saved_path` the newest checkpoint."""

    def __init__(self, trainer: StageTrainer) -> None:
        self.wanted = trainer.run.checkpoint
        self.interval_steps = self.wanted.interval_steps
        self.store = checkpoint_store(trainer.run)
        if is_main_rank():
            self.store.clean([stage.name for stage in trainer.run.stages])
        start = trainer.start
        self.pending: SaveHandle | None = None
        self.position = trainer.position()
        self.saved_step = start.step if start.step and start.source else -1
        self.saved_path = start.source if start.resumes else None
        if self.wanted.asynchronous:
            prepare_asynchronous_save(trainer.state.chunks, trainer.state.optimizer)

    @property
    def failed(self) -> bool:
        """Whether this rank knows that the save in progress has failed."""
        return self.pending is not None and self.pending.failed

    def on_start(self, trainer: StageTrainer) -> None:
        """Save at once if a rollback would find no checkpoint on disk: copies in memory do not last."""
        if trainer.step and self.saved_step < 0 and trainer.stage.stability.policy == "rollback":
            self.save(trainer)

    def at_interval(self, trainer: StageTrainer) -> None:
        """Save, except at the last step, which `on_end` saves after all else."""
        if trainer.step < trainer.budget.steps:
            self.save(trainer)

    def on_end(self, trainer: StageTrainer, finished: bool) -> None:
        """Save and wait for it."""
        self.save(trainer)
        self.finish(trainer)

    def save(self, trainer: StageTrainer) -> None:
        """Save this step unless it is saved already; waits for the save before it."""
        if self.saved_step == trainer.step:
            return
        self.finish(trainer)
        for hook in trainer.hooks:
            hook.on_save(trainer)
        if trainer.log:
            trainer.log.sync()
        self.saved_path = self.store.new_path(trainer.stage.name, trainer.step, trainer.start.taken)
        state = (trainer.state.chunks, trainer.state.optimizer, trainer.manifest())
        with trainer.meter.stall("save"):
            self.pending = save_state(self.saved_path, *state, self.wanted.asynchronous)
        self.saved_step, self.position = trainer.step, trainer.position()
        if not self.wanted.asynchronous:
            self.finish(trainer)

    def finish(self, trainer: StageTrainer) -> None:
        """Wait for the save in progress, then remove checkpoints that are no longer kept.

        Raises, on every rank, whatever failed on any.
        """
        if self.pending is None:
            return
        with trainer.meter.stall("save"):
            path = self.pending.path
            self.pending.wait()
            self.pending = None
            if trainer.log:
                trainer.log.write(SaveEvent(*self.position, "/".join(path.parts[-3:])))
            if is_main_rank():
                self.store.prune(trainer.stage.name, self.wanted.keep_last, self.wanted.keep_every_steps)
