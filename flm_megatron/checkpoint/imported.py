"""The manifest that a checkpoint of another program gets when it becomes one of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flm_megatron.checkpoint.logical import LogicalCheckpoint
from flm_megatron.checkpoint.own_tokenizer import TOKENIZER_FILE
from flm_megatron.checkpoint.stage_manifest import StagePosition, stage_manifest
from flm_megatron.config.schema import ModelConfig, RunConfig, StageConfig

IMPORTED = "imported"


def manifest_for(view: LogicalCheckpoint, model: ModelConfig, source: Path) -> dict[str, Any]:
    """The manifest of a copy of `view`: its own if it names its run, else that of a run of one stage with `model`.

    The copy's stage is called `imported`; where it stands in its run is kept as far as `view` knows. A tokenizer that
    lies beside the weights is named in the run. Adam's step is not made up: moments whose step `view` does not know
    have none.
    """
    if view.manifest.get("run"):
        return dict(view.manifest)
    tokenizer = source / TOKENIZER_FILE
    run = RunConfig(
        name=source.resolve().name,
        tokenizer=str(tokenizer.resolve()) if tokenizer.is_file() else None,
        stages=[StageConfig(name=IMPORTED, model=model)],
    )
    known = view.manifest
    adam_step = known.get("optimizer_step") if view.has_optimizer() else 0
    position = StagePosition(known.get("step", 0), known.get("samples", 0), known.get("tokens", 0), adam_step)
    return known | stage_manifest(run, 0, model, position)
