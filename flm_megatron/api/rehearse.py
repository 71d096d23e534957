"""A run rehearsed: ranks of its stages through their life at true size, before the machines are asked for."""

from __future__ import annotations

from dataclasses import dataclass

from flm_megatron.api.values import require_whole
from flm_megatron.config.ranges import LARGEST_WORLD
from flm_megatron.config.schema import RunConfig
from flm_megatron.errors import RequestError
from flm_megatron.growth.foreseen import check_run_file
from flm_megatron.planner.chosen_stages import only_stage, whole_run, with_vocabulary
from flm_megatron.planner.rehearsal.report import rehearsal_data, rehearsal_text
from flm_megatron.planner.rehearsal.stage import StageRehearsal, rehearse_stage


@dataclass(frozen=True)
class Rehearsal:
    """Every stage that was rehearsed. `str(rehearsal)` is the report that `flm rehearse` prints, `to_dict()` what it
    prints with `--json`."""

    stages: tuple[StageRehearsal, ...]

    def __str__(self) -> str:
        """The report."""
        return "\n\n".join(rehearsal_text(stage) for stage in self.stages)

    def to_dict(self) -> dict[str, object]:
        """Plain data: bytes, operations, counts."""
        return {"stages": [rehearsal_data(stage) for stage in self.stages]}


def rehearse(
    run: RunConfig, *, gpus: int, stage: str | None = None, rank: int | None = None, workers: int | None = None
) -> Rehearsal:
    """Run one training step of chosen ranks of the real program at true size, on this machine and without values.

    Args:
        run: as `load_run` gives it.
        gpus: processes that the run would have.
        stage: rehearse this stage alone.
        rank: rehearse this rank, not one of every role.
        workers: processes of this machine that share the work (as many as it has processors).

    Raises:
        RequestError: a layout that these many cannot have, or a rank that is not among them.
        FlmError: ranks would wait for each other for ever; the message has both call sites.
    """
    require_whole("gpus", gpus, LARGEST_WORLD)
    require_whole("workers", workers, LARGEST_WORLD)
    if rank is not None and not 0 <= rank < gpus:
        raise RequestError(f"rank is {rank}, but {gpus:,} processes have the ranks 0 to {gpus - 1:,}")
    if run.data.chat is not None:
        from flm_megatron.launch.fine_tuning import without_conversations

        run = without_conversations(run)
    chosen = with_vocabulary(only_stage(run, stage))
    check_run_file(chosen, gpus)
    run, names = whole_run(run, chosen), [one.name for one in chosen.stages]
    stages = [one for one in run.stages if one.name in names]
    return Rehearsal(tuple(rehearse_stage(run, one, gpus, rank, workers) for one in stages))
