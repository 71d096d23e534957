"""A stage's manifest, written by one function, and the model it records, read by another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from flm_megatron.checkpoint.logical import LogicalCheckpoint
from flm_megatron.checkpoint.own_tokenizer import TOKENIZER_FILE
from flm_megatron.checkpoint.position import StagePosition, recorded_position
from flm_megatron.checkpoint.recorded_run import recorded_run
from flm_megatron.config.loader import run_to_dict
from flm_megatron.config.schema import ModelConfig, RunConfig, StageConfig
from flm_megatron.data.tokenizer import file_fingerprint
from flm_megatron.errors import RequestError
from flm_megatron.model.limits import check_limits

IMPORTED = "imported"
"""Stage name of checkpoints from other programs."""


def stage_manifest(
    run: RunConfig,
    stage_index: int,
    model: ModelConfig,
    position: StagePosition,
    growth: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The manifest of stage `stage_index`, which trains `model`: the run file's, but for what growth derives.

    `growth` is the growth that the stage began with (`growth.record.GrowthRecord.to_json`). What is not known of
    `position` is left out. The tokenizer is named by its fingerprint too, where its file is there.
    """
    stages = list(run.stages)
    stages[stage_index] = replace(stages[stage_index], model=model)
    fingerprint = file_fingerprint(run.tokenizer) if run.tokenizer else None
    return {
        "run": run_to_dict(replace(run, stages=stages)),
        **replace(position, stage=stages[stage_index].name).to_json(),
        **({"growth": dict(growth)} if growth else {}),
        **({"tokenizer_sha256": fingerprint} if fingerprint else {}),
    }


def manifest_model(manifest: Mapping[str, Any], where: str = "manifest.json") -> ModelConfig | None:
    """The model of the stage that a manifest is of; none where it names no run.

    Of a stage that grew it is the plan's, which is what is trained: earlier versions of `flm grow` wrote the
    configured one beside it, whose norm_epsilon and vocabulary may be others.

    Raises:
        RequestError: there is one, with fields or values that this program does not know.
    """
    name = recorded_position(manifest).stage
    plan = (manifest.get("growth") or {}).get("plan") or {}
    stage = recorded_run(manifest).stage(name)
    found = stage.model if stage else None
    if found is not None and plan.get("stage") == name:
        found = plan.get("new")
    try:
        return None if found is None else check_limits(ModelConfig(**found), where)
    except RequestError:
        raise
    except (ValidationError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise RequestError(
            f"{where}: the model of stage {name!r} is not one that this program knows ({reason:.200}): update it"
        ) from None


def manifest_for(checkpoint: LogicalCheckpoint, model: ModelConfig, source: Path) -> dict[str, Any]:
    """The manifest of a copy of `checkpoint`: its own if it names its run, else that of a run of one stage with
    `model`.

    The copy's stage is called `imported`; where it stands in its run is kept as far as `checkpoint` knows. A tokenizer
    that lies beside the weights is named in the run. Adam's step is not made up: moments whose step `checkpoint` does
    not know have none.
    """
    if checkpoint.manifest.get("run"):
        return dict(checkpoint.manifest)
    tokenizer = source / TOKENIZER_FILE
    run = RunConfig(
        name=source.resolve().name,
        tokenizer=str(tokenizer.resolve()) if tokenizer.is_file() else None,
        stages=[StageConfig(name=IMPORTED, model=model)],
    )
    known = recorded_position(checkpoint.manifest)
    adam_step = known.optimizer_step if checkpoint.has_optimizer() else 0
    position = StagePosition(known.step or 0, known.samples or 0, known.tokens or 0, adam_step)
    return checkpoint.manifest | stage_manifest(run, 0, model, position)
