"""Where a run goes on: which stage, which step, and from which checkpoint."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from flm_megatron.checkpoint.initial import InitialCheckpoint
from flm_megatron.checkpoint.logical import LogicalCheckpoint
from flm_megatron.checkpoint.opening import open_checkpoint
from flm_megatron.checkpoint.store import CheckpointStore
from flm_megatron.config.budget import stage_budgets
from flm_megatron.config.loader import run_from_dict
from flm_megatron.config.schema import ModelConfig, RunConfig, StageConfig
from flm_megatron.errors import RequestError

DERIVED_FIELDS = ("norm_epsilon",)  # growth may change these; the checkpoint has the last word


@dataclass(frozen=True)
class Start:
    """The next stage to train: `step` steps of it are done. `source` is read first: its own checkpoint if `step` is
    above 0, else the last of the stage before, or what the first stage starts from; none means fresh weights."""

    stage: int
    step: int
    source: Path | None


def checkpoint_store(run: RunConfig) -> CheckpointStore:
    """The run's checkpoints."""
    return CheckpointStore(Path(run.output) / "checkpoints")


def find_start(run: RunConfig, only: str | None = None) -> Start | None:
    """What is left to do, from the newest whole checkpoint; none when every stage (or the one named `only`) is done.

    Raises:
        RequestError: `only` is not a stage, or the stage before it is not finished.
    """
    names = [stage.name for stage in run.stages]
    if only is not None and only not in names:
        raise RequestError(f"no stage is named {only!r}; the run has {', '.join(names)}")
    wanted = names[: names.index(only) + 1] if only else names
    start = _after(run, checkpoint_store(run).latest(wanted))
    if start.stage >= len(wanted):
        return None
    if only and names[start.stage] != only:
        missing = names[start.stage]
        raise RequestError(f"stage {only!r} needs stage {missing!r} to be finished: train it first")
    return start


def _after(run: RunConfig, path: Path | None) -> Start:
    """What follows the checkpoint at `path`."""
    if path is None:
        initial = run.checkpoint.initial
        return Start(0, 0, Path(initial) if initial else None)
    manifest = open_checkpoint(path).manifest
    stage = [stage.name for stage in run.stages].index(manifest["stage"])
    done = manifest["step"] >= stage_budgets(run)[stage].steps
    return Start(stage + 1, 0, path) if done else Start(stage, manifest["step"], path)


def resumed_stage(stage: StageConfig, saved: dict[str, Any]) -> StageConfig:
    """The stage as its own checkpoint's `manifest` has it, with everything that may change taken from the run file.

    Raises:
        RequestError: the model's shape is another one.
    """
    model = next(s.model for s in run_from_dict(saved["run"]).stages if s.name == saved["stage"])
    differing = [
        f"{name} was {before!r} and is {now!r}"
        for (name, before), now in zip(asdict(model).items(), asdict(stage.model).values(), strict=True)
        if before != now and name not in DERIVED_FIELDS
    ]
    if differing:
        raise RequestError(
            f"stage {stage.name!r} cannot go on with another model: {'; '.join(differing)}; "
            "put the values back, or start a new run with another `output`"
        )
    return replace(stage, model=model)


def first_view(run: RunConfig, model: ModelConfig, source: Path | None) -> LogicalCheckpoint:
    """What the first stage starts from: a checkpoint's weights (`checkpoint.initial`), or fresh ones.

    Raises:
        RequestError: the checkpoint's tensors are not the model's.
    """
    if source is None:
        return InitialCheckpoint(model, run.seed)
    view = open_checkpoint(source)
    wanted = {name: info.shape for name, info in InitialCheckpoint(model, run.seed).tensors.items()}
    for name, shape in wanted.items():
        found = view.tensors[name].shape if name in view.tensors else None
        if found != shape:
            raise RequestError(f"{source}: {name} is {found}, but the first stage's model needs {shape}")
    return view
