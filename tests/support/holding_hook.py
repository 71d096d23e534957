"""A hook that makes a run as slow as a test needs it."""

from __future__ import annotations

import time
from pathlib import Path

from flm_megatron.training.hooks import Hook
from flm_megatron.training.stage import StageTrainer

HOLD = "hold"


class Holding(Hook):
    """Steps take half a second more while the file `hold` lies in the run's output."""

    def before_step(self, trainer: StageTrainer) -> None:
        """On every rank."""
        if (Path(trainer.run.output) / HOLD).exists():
            time.sleep(0.5)
