"""Opens a run file and fills in the models that it takes from `checkpoint.initial`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from flm_megatron.config.loader import load_run
from flm_megatron.config.overrides import Overrides
from flm_megatron.config.same_model import laid_over
from flm_megatron.config.schema import ModelConfig, RunConfig, StageConfig
from flm_megatron.errors import RequestError


def open_run(path: str | Path, overrides: Overrides = ()) -> RunConfig:
    """`load_run`, with every `model: from_checkpoint` filled in.

    Raises:
        RequestError: the run file cannot be read, or the checkpoint's model cannot be taken.
        DamagedError: the checkpoint cannot be read.
    """
    return with_checkpoint_models(load_run(path, overrides))


def with_checkpoint_models(run: RunConfig) -> RunConfig:
    """The run with the model of `checkpoint.initial` in every stage that takes it.

    The checkpoint is opened only if a stage does.

    Raises:
        RequestError: there is no such checkpoint, it does not say what model it is of, the stage states another one
            beside it, or grows.
        DamagedError: the checkpoint cannot be read.
    """
    if not any(stage.model.from_checkpoint for stage in run.stages):
        return run
    found = _initial_model(run)
    stages = [stage_of_checkpoint(stage, found) if stage.model.from_checkpoint else stage for stage in run.stages]
    return replace(run, stages=stages)


def stage_of_checkpoint(stage: StageConfig, found: ModelConfig) -> StageConfig:
    """The stage with `found`, the model of `checkpoint.initial`, and the fields that may be given beside it.

    Raises:
        RequestError: it states another model, or it grows or shrinks.
    """
    if (stage.growth, stage.shrink) != (None, None):
        verb = "grows" if stage.growth is not None else "shrinks"
        raise RequestError(
            f"stage {stage.name!r} {verb}, so its model is not that of checkpoint.initial: state the one that it "
            f"{verb} into"
        )
    model, other = laid_over(stage.model, found)
    if other:
        raise RequestError(
            f"stage {stage.name!r} describes another model than checkpoint.initial ({'; '.join(other)}): "
            "leave these out, the model comes with the checkpoint"
        )
    return replace(stage, model=model)


def _initial_model(run: RunConfig) -> ModelConfig:
    from flm_megatron.checkpoint.described import recorded_model
    from flm_megatron.checkpoint.opening import open_checkpoint

    names = ", ".join(stage.name for stage in run.stages if stage.model.from_checkpoint)
    if run.checkpoint.initial is None:
        raise RequestError(f"stage {names}: model is from_checkpoint, but checkpoint.initial is not set: name one")
    vocab_size = _vocabulary(run)
    try:
        checkpoint = open_checkpoint(run.checkpoint.initial, vocab_size)
    except RequestError as error:
        resolved = Path(run.output) / "run.yaml"
        hint = f"; {resolved} has the model written out" if resolved.is_file() else ""
        raise RequestError(f"model is from_checkpoint in stage {names}: {error}{hint}") from None
    found = recorded_model(checkpoint, vocab_size)
    if found is None:
        raise RequestError(f"{run.checkpoint.initial} does not say what model it is of: state it in the run file")
    return found


def _vocabulary(run: RunConfig) -> int | None:
    """The true vocabulary, for checkpoints that do not record theirs."""
    from flm_megatron.data.tokenizer import open_tokenizer, tokenizer_exists

    if run.tokenizer is not None and tokenizer_exists(run.tokenizer):
        return open_tokenizer(run.tokenizer).vocab_size
    return next((stage.model.vocab_size for stage in run.stages if stage.model.vocab_size), None)
