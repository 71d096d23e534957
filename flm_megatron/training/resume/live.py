"""From stage to stage inside running ranks: what one leaves in their memory is kept until the next has loaded it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from flm_megatron.checkpoint.exchange.live import Crossing, LiveCheckpoint
from flm_megatron.checkpoint.logical import LogicalCheckpoint
from flm_megatron.checkpoint.sharding.model_state import held_state, load_live_state
from flm_megatron.errors import FlmError

if TYPE_CHECKING:
    from flm_megatron.checkpoint.exchange.description import Held
    from flm_megatron.checkpoint.manifest import StagePosition
    from flm_megatron.engine.types import Optimizer, ReplicatedChunk

NOT_USED = (
    "checkpoint.live_boundaries is not used: without torchrun the processes of a stage end with it, and the next stage "
    "loads its checkpoint"
)
View = Callable[[LogicalCheckpoint], LogicalCheckpoint]
"""The lazy checkpoint that a stage begins with, over the last one of the stage before."""


class LiveView(NamedTuple):
    """A checkpoint to load, and the live one that it reads."""

    checkpoint: LogicalCheckpoint
    source: LiveCheckpoint

    def load(self, chunks: list[ReplicatedChunk], optimizer: Optimizer) -> Crossing:
        """Fill a model and its optimizer; as `load_live_state`."""
        return load_live_state(self.checkpoint, self.source, chunks, optimizer)


@dataclass
class LiveBoundary:
    """The state of the stage that ended last, in the memory of the ranks. All of them call its methods together."""

    at: StagePosition | None = None
    held: list[Held] | None = None

    def keep(self, chunks: list[ReplicatedChunk], optimizer: Optimizer, at: StagePosition) -> None:
        """Keep the weights, masters and moments of a stage that has ended `at` its last step. The memory is the
        training's own; gradients and everything else go with the stage."""
        self.at, self.held = at, held_state(chunks, optimizer)

    def view(self, saved: LogicalCheckpoint, view: View = lambda held: held) -> LiveView | None:
        """`view` of what is kept, of which `saved` is the checkpoint; none if no stage has ended in these ranks.

        Raises:
            FlmError: `saved` is a checkpoint of something else.
        """
        if self.held is None or self.at is None:
            return None
        found = saved.manifest.position
        if (found.stage, found.step) != (self.at.stage, self.at.step):
            raise FlmError(
                f"the ranks hold stage {self.at.stage!r} at step {self.at.step}, but the run goes on from stage "
                f"{found.stage!r} at step {found.step}: start again to go on from the disk"
            )
        live = LiveCheckpoint(saved, self.held)
        return LiveView(view(live), live)

    def release(self) -> None:
        """Give the memory back: the next stage has its own state. Its live view lasts as long as it does, and holds
        nothing from here on."""
        if self.held is not None:
            self.held.clear()
        self.at = self.held = None
        gc.collect()
