"""What the tools need of a manifest's run file: the tokenizer, the data, the models of the stages.

Run files of other versions may have other fields, so it is not read as a run file here. A run that resumes compares it
field by field (`training.resume`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

UNRECORDED_LENGTH = 4096
"""Tokens of a sample if a checkpoint does not record them."""


@dataclass(frozen=True)
class RecordedStage:
    """A stage: `model` are the fields of its model configuration, `precision` is its training precision."""

    name: str
    model: Mapping[str, Any]
    precision: str = "fp32"


@dataclass(frozen=True)
class RecordedRun:
    """`tokenizer` is the path of its file, `train` are the paths of the training data; empty where not recorded."""

    tokenizer: str | None = None
    sequence_length: int = UNRECORDED_LENGTH
    train: tuple[str, ...] = ()
    stages: tuple[RecordedStage, ...] = ()

    def stage(self, name: str | None) -> RecordedStage | None:
        """The stage of a name; none if there is none."""
        return next((stage for stage in self.stages if stage.name == name), None)


def recorded_run(manifest: Mapping[str, Any]) -> RecordedRun:
    """The run of a manifest; empty if it has none, as other programs' checkpoints."""
    run = manifest.get("run") or {}
    data = run.get("data") or {}
    return RecordedRun(
        tokenizer=run.get("tokenizer"),
        sequence_length=data.get("sequence_length") or UNRECORDED_LENGTH,
        train=tuple(source["path"] for source in data.get("train", [])),
        stages=tuple(
            RecordedStage(stage["name"], stage["model"], stage.get("precision") or RecordedStage.precision)
            for stage in run.get("stages", [])
        ),
    )
