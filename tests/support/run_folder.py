"""A run's output folder as the program leaves it, without training: a run file, its metrics and its times."""

from __future__ import annotations

import json
from pathlib import Path

from flm_megatron.config.loader import dump_run
from flm_megatron.config.schema import DataConfig, ModelConfig, RunConfig, StageConfig
from flm_megatron.growth.record import Certificate, Comparison
from flm_megatron.training.metrics.events import (
    FILE,
    GrowthEvent,
    MetricsEvent,
    SaveEvent,
    StepEvent,
    ValidationEvent,
    line_text,
)

STEP_TOKENS = 64
STAGES = [
    StageConfig(name="small", model=ModelConfig(vocab_size=300), global_batch=8, tokens=20 * STEP_TOKENS),
    StageConfig(name="grown", model=ModelConfig(vocab_size=300), global_batch=8, tokens=10 * STEP_TOKENS),
]


def step_event(stage: str, step: int, done: int, loss: float) -> StepEvent:
    """A step, `done` steps into the run, on 4 ranks of 32 tokens a second each."""
    return StepEvent(stage, step, done * STEP_TOKENS, loss, 0.5, 1e-3, 0.5, 32.0, 0.01, None, 1.5, 7.0)


def events(steps: int) -> list[MetricsEvent]:
    """The first `steps` steps of two stages, with what stands between them."""
    found: list[MetricsEvent] = []
    for done in range(1, steps + 1):
        stage, step = ("small", done) if done <= 20 else ("grown", done - 20)
        found.append(step_event(stage, step, done, 5 - done / 10))
        if done == 20:
            found.append(ValidationEvent("small", 20, done * STEP_TOKENS, 3.25, {}))
            found.append(SaveEvent("small", 20, done * STEP_TOKENS, "checkpoints/small/step_00000020"))
            after = Comparison("fp32", 2e-6, 1e-6, 2.0, 3.0, 3.000003)
            certificate = Certificate("grown", True, 4, 8, (after,))
            found.append(GrowthEvent("grown", 0, done * STEP_TOKENS, certificate))
    return found


def make_run_folder(folder: Path, steps: int, name: str = "demo") -> Path:
    """The folder of a run that has come as far as `steps` steps of its 30."""
    folder.mkdir(parents=True)
    run = RunConfig(name=name, output=str(folder), data=DataConfig(sequence_length=8), stages=STAGES)
    (folder / "run.yaml").write_text(dump_run(run), encoding="utf-8")
    append(folder, events(steps))
    times: list[dict[str, object]] = [
        {"what": "begin", "time": 100.0, "index": 0, "stage": "small", "step": 0, "started": 90.0},
        {"what": "step", "time": 110.0, "step": 1, "seconds": 10.0, "data_s": 0.0},
        {"what": "save", "time": 112.0, "seconds": 2.0},
    ]
    (folder / "goodput.jsonl").write_text("".join(json.dumps(line) + "\n" for line in times), encoding="utf-8")
    (folder / "checkpoints" / "small" / "step_00000020").mkdir(parents=True)
    return folder


def append(folder: Path, lines: list[MetricsEvent]) -> None:
    """Add lines to the metrics."""
    with (folder / FILE).open("a", encoding="utf-8") as file:
        file.writelines(line_text(line) + "\n" for line in lines)
