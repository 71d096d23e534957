"""A hook that writes down every moment at which it is called."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist

from flm_megatron.training.hooks import Hook
from flm_megatron.training.stage import StageTrainer
from flm_megatron.training.step import StepResult

FILE = "moments"


class Recording(Hook):
    """One line in the run's output for each moment: the rank, what it is called and the steps done."""

    interval_steps = 2

    def note(self, moment: str, trainer: StageTrainer) -> None:
        """Add a line."""
        with (Path(trainer.run.output) / FILE).open("a") as file:
            print(dist.get_rank(), moment, trainer.step, file=file)

    def on_start(self, trainer: StageTrainer) -> None:
        self.note("start", trainer)

    def before_step(self, trainer: StageTrainer) -> None:
        self.note("before", trainer)

    def after_step(self, trainer: StageTrainer, result: StepResult) -> Mapping[str, float]:
        self.note("after", trainer)
        return {"half_loss": result.loss / 2}

    def at_interval(self, trainer: StageTrainer) -> None:
        self.note("interval", trainer)

    def on_save(self, trainer: StageTrainer) -> None:
        self.note("save", trainer)

    def on_end(self, trainer: StageTrainer, finished: bool) -> None:
        self.note(f"end-{finished}", trainer)


class Refusing(Hook):
    """Lets nothing be saved."""

    def on_save(self, trainer: StageTrainer) -> None:
        """Always."""
        raise ValueError("this must not be saved")


class StopInLastStep(Hook):
    """Sends its process SIGTERM in the last step of each stage."""

    def before_step(self, trainer: StageTrainer) -> None:
        """On one rank, which tells the others."""
        if trainer.step == trainer.budget.steps - 1 and dist.get_rank() == 0:
            os.kill(os.getpid(), signal.SIGTERM)


class WithArguments(Hook):
    """Cannot be made by the program."""

    def __init__(self, needed: int) -> None:
        self.needed = needed
