"""The manifest that a checkpoint of another program gets when it becomes one of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flm_megatron.checkpoint.logical import LogicalCheckpoint
from flm_megatron.config.loader import run_to_dict
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
    tokenizer = source / "tokenizer.model"
    run = RunConfig(
        name=source.resolve().name,
        tokenizer=str(tokenizer.resolve()) if tokenizer.is_file() else None,
        stages=[StageConfig(name=IMPORTED, model=model)],
    )
    known = dict.fromkeys(("step", "tokens", "samples"), 0) | view.manifest
    if not view.has_optimizer():
        known["optimizer_step"] = 0
    return known | {"run": run_to_dict(run), "stage": IMPORTED}
