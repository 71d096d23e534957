"""The base class of hooks, and loading the user's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from flm_megatron.training.user_class import user_class

if TYPE_CHECKING:
    from flm_megatron.training.stage import StageTrainer
    from flm_megatron.training.step import StepResult


class Hook:
    """A class of its own for each thing that is done between steps: override the moments that matter.

    Every rank makes its own, without arguments and anew for each stage, and all ranks call all hooks in the same
    order: a hook may communicate. What it raises ends the run. Of the `trainer` it may read `run`, `stage`, `budget`,
    `step` (steps done), `state.chunks` (model chunks), `state.optimizer`, and `log`, which is None but on the main
    rank.
    """

    interval_steps: int = 0
    """Steps between two calls of `at_interval`; 0 for none."""

    def on_start(self, trainer: StageTrainer) -> None:
        """Before the first step; weights and optimizer are loaded."""

    def before_step(self, trainer: StageTrainer) -> None:
        """Before each step."""

    def after_step(self, trainer: StageTrainer, result: StepResult) -> Mapping[str, float]:
        """After each step that was applied; returns metrics to record with the step's own."""
        return {}

    def at_interval(self, trainer: StageTrainer) -> None:
        """After each `interval_steps`-th step of the stage, refused or not."""

    def on_save(self, trainer: StageTrainer) -> None:
        """Before a checkpoint is saved."""

    def on_end(self, trainer: StageTrainer, finished: bool) -> None:
        """After the last step. Unless `finished`, after the step at which a signal stopped the stage."""


def load_hook(path: str) -> type[Hook]:
    """Import the class that an entry of the run file's `hooks` names.

    Raises:
        RequestError: it cannot be imported, is no hook, or cannot be made without arguments.
    """
    return user_class(path, Hook, "hooks")
