"""A rank loads the state that its stage begins with: what it reads, of which tensors and files, with nothing read."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from flm_megatron.checkpoint.sharding.model_state import load_state
from flm_megatron.checkpoint.without_values import without_values
from flm_megatron.engine.optimizer import parts
from flm_megatron.engine.types import Optimizer
from flm_megatron.growth.grown.entries import load_entries
from flm_megatron.optim.by_entry import BY_ENTRY
from flm_megatron.planner.rehearsal.life.beginning import Beginning
from flm_megatron.planner.rehearsal.life.counted import Amount
from flm_megatron.planner.rehearsal.recorder import Recorder, Transfer
from flm_megatron.training.step import TrainState


@dataclass
class Loading:
    """What a rank reads where a stage begins.

    `how` it begins and `where` the checkpoint is (none where it is not on this machine); regions and bytes by tensor of
    that checkpoint, and by file where it is here; `drawn` are new values, which are read nowhere. `adam_step` is the
    step that Adam goes on at (none where the checkpoint is not here), `offset_bytes` those of what AdamW is told of
    entries until it no longer matters: the step at which each was added, and whether its learning rate is its own.
    `transfers` bring what replicas read for each other.
    """

    how: str
    where: str | None = None
    tensors: dict[str, Amount] = field(default_factory=dict)
    files: dict[str, Amount] = field(default_factory=dict)
    drawn: Amount = field(default_factory=Amount)
    adam_step: int | None = None
    offset_bytes: int = 0
    transfers: tuple[Transfer, ...] = ()

    def note(self, file: Path | None, nbytes: int) -> None:
        """A region that would be read, or drawn."""
        (self.drawn if file is None else self.files.setdefault(str(file), Amount())).add(nbytes)


def load(recorder: Recorder, state: TrainState, beginning: Beginning) -> Loading:
    """Fill weights and optimizer as a real rank does when its stage begins so, with tensors without values.

    What `recorder` noted before is left out.
    """
    recorder.forget()
    found = Loading(beginning.how, str(beginning.where) if beginning.where else None)
    with without_values(found.note):
        load_state(beginning.checkpoint, state.chunks, state.optimizer)
        load_entries(beginning.checkpoint, state.stage, state.chunks, state.optimizer)
    found.transfers = recorder.forget()
    found.tensors = beginning.source.tensors_read
    if beginning.where:
        found.adam_step = max(group.get("step", 0) for group in state.optimizer.param_groups)
    found.offset_bytes = _offset_bytes(state.optimizer)
    return found


def _offset_bytes(optimizer: Optimizer) -> int:
    held = (values for part in parts(optimizer) for values in part.optimizer.state.values())
    return sum(values[name].nbytes for values in held for name in BY_ENTRY if name in values)
