"""What a rank writes of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

from flm_megatron.checkpoint.sharding.model_state import shard_file, stored_state
from flm_megatron.checkpoint.sharding.snapshot import placed
from flm_megatron.checkpoint.torch_dist.tensor_record import record_bytes
from flm_megatron.config.schema import RunConfig
from flm_megatron.planner.rehearsal.life.counted import Amount, by_state
from flm_megatron.planner.rehearsal.recorder import Recorder, Transfer
from flm_megatron.training.resume.start import checkpoint_store
from flm_megatron.training.step import TrainState


@dataclass(frozen=True)
class Saving:
    """Regions and bytes of weights, masters and moments that a rank writes into `file`, and the bytes of that file.

    `host_bytes` are those of the copy that is written in the background, 0 where training waits for the disk.
    """

    file: str
    states: dict[str, Amount]
    file_bytes: int
    host_bytes: int
    transfers: tuple[Transfer, ...]


def saved(recorder: Recorder, run: RunConfig, state: TrainState, rank: int) -> Saving:
    """What `rank` would write of its state now; all that it asks of other ranks before is asked.

    What `recorder` noted before is left out.
    """
    recorder.forget()
    _, stored = stored_state(state.chunks, state.optimizer)
    folder = checkpoint_store(run).root / state.stage.name / "step_*"
    return Saving(
        file=str(folder / shard_file(rank)),
        states=by_state((name, Amount(1, tensor.nbytes)) for name, _, tensor in stored),
        file_bytes=sum(record_bytes(tensor.dtype, tuple(tensor.shape)) for _, _, tensor in stored),
        host_bytes=placed(stored)[1] if run.checkpoint.asynchronous else 0,
        transfers=recorder.forget(),
    )
