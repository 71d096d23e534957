"""From stage to stage inside running ranks: what one leaves in their memory is kept until the next has loaded it."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flm_megatron.checkpoint.exchange.live import LiveCheckpoint
from flm_megatron.checkpoint.logical import LogicalCheckpoint
from flm_megatron.checkpoint.sharding.model_state import held_state
from flm_megatron.errors import FlmError

if TYPE_CHECKING:
    from flm_megatron.checkpoint.exchange.description import Held
    from flm_megatron.checkpoint.manifest import StagePosition
    from flm_megatron.engine.types import Optimizer, ReplicatedChunk

NOT_USED = (
    "checkpoint.live_boundaries is not used: without torchrun the processes of a stage end with it, and the next stage "
    "loads its checkpoint"
)


@dataclass
class LiveBoundary:
    """The state of the stage that ended last, in the memory of the ranks. All of them call its methods together."""

    at: StagePosition | None = None
    held: list[Held] | None = None
    checkpoint: LiveCheckpoint | None = None

    def keep(self, chunks: list[ReplicatedChunk], optimizer: Optimizer, at: StagePosition) -> None:
        """Keep the weights, masters and moments of a stage that has ended `at` its last step. The memory is the
        training's own; gradients and everything else go with the stage."""
        self.at, self.held = at, held_state(chunks, optimizer)

    def of(self, saved: LogicalCheckpoint) -> LiveCheckpoint | None:
        """What is kept, of which `saved` is the checkpoint; none if no stage has ended in these ranks.

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
        self.checkpoint = LiveCheckpoint(saved, self.held)
        return self.checkpoint

    def release(self) -> None:
        """Give the memory back: the next stage has its own state."""
        if self.checkpoint is not None:
            self.checkpoint.release()
        self.at = self.held = self.checkpoint = None
        gc.collect()
