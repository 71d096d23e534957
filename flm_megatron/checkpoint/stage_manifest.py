"""A stage's manifest, written by one function, and the model it records, read by another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from flm_megatron.checkpoint.logical import LogicalCheckpoint
from flm_megatron.checkpoint.manifest import Manifest, RecordedRun, StagePosition
from flm_megatron.config.loader import run_to_dict
from flm_megatron.config.schema import DataConfig, ModelConfig, RunConfig, StageConfig
from flm_megatron.data.tokenizer import tokenizer_fingerprint, tokenizer_in
from flm_megatron.errors import FlmError, RequestError
from flm_megatron.model.limits import check_limits

IMPORTED = "imported"
"""Stage name of checkpoints from other programs."""
_MODEL = TypeAdapter(ModelConfig)


def stage_manifest(run: RunConfig, stage_index: int, model: ModelConfig, position: StagePosition) -> Manifest:
    """The manifest of stage `stage_index`, which trains `model`: the run file's, but for what growth derives.

    The tokenizer is named by its fingerprint too, where its file is there.
    """
    stages = list(run.stages)
    stages[stage_index] = replace(stages[stage_index], model=model)
    return Manifest(
        run=RecordedRun.model_validate(run_to_dict(replace(run, stages=stages))),
        position=replace(position, stage=stages[stage_index].name),
        tokenizer_sha256=tokenizer_fingerprint(run.tokenizer) if run.tokenizer else None,
        chat_template_sha256=chat_template_fingerprint(run),
    )


def chat_template_fingerprint(run: RunConfig) -> str | None:
    """Hash of the chat template of a fine-tuning; none of another run, or where template or tokenizer are not there."""
    if run.data.chat is None:
        return None
    from flm_megatron.data.conversations.template import template_fingerprint

    try:
        return template_fingerprint(run.data.chat.template, run.tokenizer)
    except FlmError:
        return None  # growing and planning go without it; training opens both before anything else


def manifest_model(manifest: Manifest, where: str = "manifest.json") -> ModelConfig | None:
    """The model of the stage that a manifest is of; none where it names no run.

    Of a stage that grew it is the plan's, which is what is trained: earlier versions of `flm grow` wrote the
    configured one beside it, whose norm_epsilon and vocabulary may be others.

    Raises:
        RequestError: there is one, with fields or values that this program does not know.
    """
    name = manifest.position.stage
    plan = manifest.growth.plan if manifest.growth else None
    stage = manifest.run.stage(name)
    found = stage.model if stage else None
    if found is not None and plan is not None and plan.stage == name:
        found = plan.new
    try:
        return None if found is None else check_limits(_MODEL.validate_python(found), where)
    except RequestError:
        raise
    except (ValidationError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise RequestError(
            f"{where}: the model of stage {name!r} is not one that this program knows ({reason:.200}): update it"
        ) from None


def manifest_for(checkpoint: LogicalCheckpoint, model: ModelConfig, source: Path) -> Manifest:
    """The manifest of a copy of `checkpoint`: its own if it names its run, else that of a run of one stage with
    `model`.

    The copy's stage is called `imported`; where it stands in its run is kept as far as `checkpoint` knows. A tokenizer
    that lies beside the weights is named in the run. Its sequence length is what one that is not recorded is taken for,
    as far as learned positions reach. Adam's step is not made up: moments whose step `checkpoint` does
    not know have none.
    """
    if checkpoint.manifest.run.saved:
        return checkpoint.manifest
    tokenizer, length = tokenizer_in(source), checkpoint.manifest.run.sequence_length
    run = RunConfig(
        name=source.resolve().name,
        tokenizer=str(tokenizer.resolve()) if tokenizer else None,
        data=DataConfig(sequence_length=min(length, model.max_positions or length)),
        stages=[StageConfig(name=IMPORTED, model=model)],
    )
    known = checkpoint.manifest.position
    adam_step = known.optimizer_step if checkpoint.has_optimizer() else 0
    position = StagePosition(known.step or 0, known.samples or 0, known.tokens or 0, adam_step)
    return checkpoint.manifest | stage_manifest(run, 0, model, position)
