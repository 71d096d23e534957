"""The checkpoint of a teacher: found, opened, and checked against the stage that it teaches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flm_megatron.checkpoint.described import check_structure, recorded_model, without_padding
from flm_megatron.checkpoint.logical import LogicalCheckpoint
from flm_megatron.checkpoint.opening import open_checkpoint
from flm_megatron.checkpoint.own_tokenizer import check_tokenizer
from flm_megatron.checkpoint.sharding.layout import check_layout
from flm_megatron.checkpoint.store import CheckpointStore
from flm_megatron.config.schema import DistillConfig, ModelConfig, RunConfig
from flm_megatron.config.stage_names import stage_index
from flm_megatron.data.tokenizer import open_tokenizer, tokenizer_exists
from flm_megatron.errors import RequestError
from flm_megatron.training.resume.start import checkpoint_store


@dataclass(frozen=True)
class TeacherSource:
    """A teacher's checkpoint, without vocabulary padding, and its model."""

    path: Path
    checkpoint: LogicalCheckpoint
    model: ModelConfig


def open_teacher(run: RunConfig, index: int) -> TeacherSource:
    """Open the teacher of stage `index`, which distils, and check it. No tensor is read.

    Raises:
        RequestError: it is not there, does not say its model, has another vocabulary or tokenizer than the stage, or
            cannot be split as asked.
        DamagedError: it cannot be read.
    """
    stage = run.stages[index]
    assert stage.distill is not None
    path, vocabulary = _path(run, stage.distill), stage.model.vocab_size
    place = f"stage {stage.name!r}: distill.teacher {path or stage.distill.teacher}"
    if path is None:
        raise RequestError(f"{place} has no checkpoint: train that stage to its end first")
    try:
        # What a Hugging Face folder calls its vocabulary is not cut to the stage's, as if the rest were padding.
        checkpoint = open_checkpoint(path, None if (path / "config.json").exists() else vocabulary)
        model = recorded_model(checkpoint, vocabulary)
        if model is None:
            raise RequestError(f"{path} does not say what model it is of")
        _check_vocabulary(run, model, vocabulary, path, checkpoint)
        if (model.max_positions or run.data.sequence_length) < run.data.sequence_length:
            raise RequestError(
                f"it has {model.max_positions} learned positions, fewer than data.sequence_length "
                f"{run.data.sequence_length}"
            )
        checkpoint = without_padding(checkpoint, model)
        check_structure(checkpoint.tensors, model, str(path))
        if stage.distill.parallel is not None:
            check_layout(model, stage.distill.parallel)
    except RequestError as error:
        raise RequestError(f"{place}: {error}") from None
    return TeacherSource(path, checkpoint, model)


def check_teachers(run: RunConfig, first: int = 0, only: str | None = None, anew: bool = False) -> None:
    """Check the teachers of the stages from `first` on (to `only`) before any of them begins; `anew` before all that
    the run has made is set aside. Raises as `open_teacher`."""
    names = [stage.name for stage in run.stages]
    last = len(names) if only is None else stage_index(run, only) + 1
    for index in range(first, last):
        stage = run.stages[index]
        if stage.distill is None:
            continue
        teacher = stage.distill.teacher
        if teacher in names and (anew or (names.index(teacher) >= first and _path(run, stage.distill) is None)):
            _check_foreseen(run, index, names.index(teacher))
        else:
            open_teacher(run, index)


def _path(run: RunConfig, distill: DistillConfig) -> Path | None:
    """The teacher's checkpoint; none if it is a stage that has none yet."""
    if distill.teacher not in {stage.name for stage in run.stages}:
        return Path(distill.teacher)
    found = (store.latest([distill.teacher]) for store in _stores(run))
    return next((path for path in found if path is not None), None)


def _stores(run: RunConfig) -> Iterator[CheckpointStore]:
    """The run's checkpoints, and those of the run that it branched off."""
    yield checkpoint_store(run)
    if run.checkpoint.branch_of is not None:
        yield CheckpointStore(Path(run.checkpoint.branch_of).parents[1])


def _check_foreseen(run: RunConfig, index: int, teacher: int) -> None:
    """Check a teacher that is still to be trained."""
    student, other = run.stages[index], run.stages[teacher]
    if student.model.vocab_size != other.model.vocab_size:
        raise RequestError(
            f"stage {student.name!r}: distill.teacher {other.name!r} has a vocabulary of {other.model.vocab_size}, the "
            f"stage of {student.model.vocab_size}: a teacher has its student's"
        )
    if student.distill and student.distill.parallel is not None:
        check_layout(other.model, student.distill.parallel)


def _check_vocabulary(
    run: RunConfig, model: ModelConfig, vocabulary: int | None, path: Path, checkpoint: LogicalCheckpoint
) -> None:
    if model.vocab_size != vocabulary:
        raise RequestError(
            f"it has a vocabulary of {model.vocab_size}, the stage one of {vocabulary}: a teacher has its student's"
        )
    if run.tokenizer is not None and tokenizer_exists(run.tokenizer):
        check_tokenizer(open_tokenizer(run.tokenizer), model, str(path), checkpoint.manifest, path)
