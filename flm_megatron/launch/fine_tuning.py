"""Turns a run file into a fine-tuning: the model comes from the checkpoint, the budget from epochs of conversations."""

from __future__ import annotations

from dataclasses import replace

from flm_megatron.checkpoint.run_file import stage_of_checkpoint, with_checkpoint_models
from flm_megatron.config.loader import resolve_vocabulary
from flm_megatron.config.rules import check
from flm_megatron.config.schema import ChatConfig, ModelConfig, RunConfig, StageConfig
from flm_megatron.data.conversations.stream import ChatStream
from flm_megatron.data.streams.stage_streams import training_stream
from flm_megatron.data.tokenizer import open_tokenizer
from flm_megatron.errors import RequestError
from flm_megatron.evaluation.evaluated import open_evaluated
from flm_megatron.growth.foreseen import check_run_file
from flm_megatron.launch.preflight import require_installed
from flm_megatron.storage.path import location
from flm_megatron.training.resume.first_checkpoint import check_no_mask


def prepared(run: RunConfig) -> tuple[RunConfig, list[str]]:
    """The run with its checkpoint's model and tokenizer and its epochs' tokens, and lines that describe it.

    Raises:
        RequestError: no checkpoint, a tokenizer that is not the checkpoint's, a stage that describes another model or
            grows, packing meets Transformer Engine, conversations or template are not fit, an epoch is empty, a rule
            on run files is broken, or a kernel that is asked for by name is not there.
    """
    if run.checkpoint.initial is None:
        raise RequestError("checkpoint.initial is not set: name the checkpoint to fine-tune")
    evaluated = open_evaluated(run.checkpoint.initial, run.tokenizer)
    check_no_mask(evaluated.checkpoint.manifest, run.checkpoint.initial)
    return _of_model(run, evaluated.model, evaluated.tokenizer.path)


def without_conversations(run: RunConfig) -> RunConfig:
    """The run with its checkpoint's model in every stage, and with no look at its conversations or its tokenizer.

    Where the checkpoint is not on this machine the models that the run file states stand for its.

    Raises:
        RequestError: no checkpoint, or none here and no model that is stated; or as `prepared` on stages.
    """
    initial, chat = run.checkpoint.initial, run.data.chat or ChatConfig()
    if initial is None:
        raise RequestError("checkpoint.initial is not set: name the checkpoint to fine-tune")
    for stage in run.stages:
        _check_stage(stage, chat)
    if location(initial).exists():
        taken = [replace(stage, model=replace(stage.model, from_checkpoint=True)) for stage in run.stages]
        run = with_checkpoint_models(replace(run, stages=taken))
    for stage in run.stages:
        if replace(stage.model, lora=None) == ModelConfig():
            raise RequestError(
                f"stage {stage.name!r}: checkpoint.initial {initial} is not on this machine: state its model in the "
                "run file, such as --stages.0.model.hidden_size 8192"
            )
        _check_adapters(stage)
    return run


def _of_model(run: RunConfig, model: ModelConfig, tokenizer: str) -> tuple[RunConfig, list[str]]:
    """The run with `model` in every stage and its epochs' tokens, and lines that describe the training data."""
    chat = run.data.chat or ChatConfig()
    stages = [_stage(stage, model, chat) for stage in run.stages]
    run = replace(run, tokenizer=tokenizer, data=replace(run.data, chat=chat), stages=stages)
    check_run_file(run)
    require_installed(run)
    lines = []
    for index in range(len(run.stages)):
        stream = training_stream(run, index)
        assert isinstance(stream, ChatStream)
        if not stream.samples:
            raise RequestError(f"stage {stages[index].name!r} takes no conversation: raise passes in data.chat.mix")
        run.stages[index] = replace(run.stages[index], tokens=stream.samples * run.data.sequence_length)
        lines.append(_line(run.stages[index].name, stream, chat))
    check(run)
    return resolve_vocabulary(run, open_tokenizer(tokenizer).vocab_size), lines


def _stage(stage: StageConfig, model: ModelConfig, chat: ChatConfig) -> StageConfig:
    _check_stage(stage, chat)
    stage = stage_of_checkpoint(stage, model)
    _check_adapters(stage)
    return stage


def _check_stage(stage: StageConfig, chat: ChatConfig) -> None:
    if stage.growth is not None:
        raise RequestError(f"stage {stage.name!r} grows: grow the checkpoint first (`flm grow`), then fine-tune it")
    if stage.shrink is not None:
        raise RequestError(
            f"stage {stage.name!r} shrinks: shrink the checkpoint first (`flm shrink`), then fine-tune it"
        )
    if stage.transformer_engine and chat.packing:
        raise RequestError(
            f"stage {stage.name!r}: packing needs attention within conversations, which transformer_engine is not "
            "asked for here: set one of transformer_engine and data.chat.packing to false"
        )


def _check_adapters(stage: StageConfig) -> None:
    lora = stage.model.lora
    if lora is None:
        return
    if lora.rank < 1 or not lora.targets:
        raise RequestError(
            f"stage {stage.name!r}: model.lora has rank {lora.rank} and targets {lora.targets}: give both"
        )
    if stage.trainable != "all" or stage.transformer_engine:
        raise RequestError(
            f"stage {stage.name!r}: model.lora goes with neither `trainable: half` nor transformer_engine: drop one"
        )


def _line(name: str, stream: ChatStream, chat: ChatConfig) -> str:
    parts = [
        f"{source.name} {len(source.conversations):,} conversations"
        f" ({source.shortened:,} shortened, {source.dropped:,} dropped: too long)"
        for source in stream.sources
    ]
    what = "packed" if chat.packing else "padded"
    return f"{name}: {chat.epochs} epochs in {stream.samples:,} {what} samples; {', '.join(parts)}"
