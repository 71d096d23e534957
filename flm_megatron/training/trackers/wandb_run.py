"""Runs at Weights & Biases, or offline in a folder for `wandb sync`."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from pathlib import Path

import wandb

from flm_megatron.training.trackers.tracker import Event, Point, Status, TrackedRun, Tracker


class WandbTracker(Tracker):
    """A run of `wandb`: numbers with the steps of all stages, events in the summary and in a file of the run."""

    def __init__(self) -> None:
        self.run: wandb.Run | None = None
        self.events = Path()

    def start(self, run: TrackedRun) -> str:
        """Begin the run under an id of its own, or go on with it."""
        options, self.events = run.options, run.events
        run.folder.mkdir(parents=True, exist_ok=True)
        settings = wandb.Settings(silent=True, console="off")
        if options.uri:
            settings.base_url = options.uri
        self.run = wandb.init(
            project=options.project or run.name,
            id=run.id or uuid.uuid4().hex[:12],
            resume="allow",
            name=run.name,
            config=run.config,
            tags=options.tags or None,
            dir=str(run.folder),
            mode=options.mode,
            settings=settings,
        )
        offline = options.mode == "offline"
        self.where = f"{Path(self.run.dir).parent} (`wandb sync` sends it)" if offline else self.run.url or ""
        return self.run.id

    def points(self, points: Sequence[Point]) -> None:
        """Log each step."""
        assert self.run is not None, "`start` comes first"
        for point in points:
            self.run.log(dict(point.values), step=point.step)

    def event(self, event: Event) -> None:
        """Send the file of all events, and the newest of its kind in the summary."""
        assert self.run is not None, "`start` comes first"
        self.run.save(str(self.events), base_path=str(self.events.parent), policy="now")
        self.run.summary[f"events/{event.what}/{event.stage}"] = event.text

    def finish(self, status: Status) -> None:
        """Send what is left; only a run that ended as it should is a success."""
        if self.run is not None:
            self.run.finish(exit_code=0 if status in ("finished", "stopped") else 1)
