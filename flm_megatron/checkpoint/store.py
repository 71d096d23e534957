"""The checkpoints of a run: one folder per stage, one folder per step in it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from flm_megatron.checkpoint.manifest import verify
from flm_megatron.checkpoint.torch_dist import TorchDistCheckpoint
from flm_megatron.checkpoint.writer import PARTIAL
from flm_megatron.errors import FlmError

STEP = re.compile(r"step_(\d{8,})")


class CheckpointStore:
    """Checkpoints under `root`/STAGE/step_XXXXXXXX."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def path(self, stage: str, step: int) -> Path:
        """Where the checkpoint of a step lies, whether it is there or not."""
        return self.root / stage / f"step_{step:08d}"

    def steps(self, stage: str) -> list[int]:
        """Steps of a stage that have a checkpoint under its final name, oldest first."""
        folder = self.root / stage
        names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
        return sorted(int(match[1]) for name in names if (match := STEP.fullmatch(name)))

    def latest(self, stages: list[str]) -> Path | None:
        """Newest checkpoint that can be loaded, of the last of `stages` that has one; none if there is none.

        A half-written or damaged one (a file missing or of another size) is passed over.
        """
        return next(self._loadable(stages), None)

    def _loadable(self, stages: list[str]) -> Iterator[Path]:
        for stage in reversed(stages):
            for step in reversed(self.steps(stage)):
                path = self.path(stage, step)
                try:
                    verify(path, quick=True)
                    TorchDistCheckpoint(path)
                except FlmError:
                    continue
                yield path

    def prune(self, stage: str, keep_last: int, keep_every_steps: int = 0) -> list[Path]:
        """Remove old checkpoints of a stage; returns what was removed.

        Kept are the newest `keep_last` that can be loaded (at least one: the last of a stage is never dropped) and
        those at multiples of `keep_every_steps`. Left-overs of saves before the newest kept one go too.
        """
        loadable = list(self._loadable([stage]))
        if not loadable:
            return []
        kept = set(loadable[: max(1, keep_last)])
        paths = {step: self.path(stage, step) for step in self.steps(stage)}
        regular = {path for step, path in paths.items() if keep_every_steps > 0 and step % keep_every_steps == 0}
        removed = [path for path in paths.values() if path not in kept | regular]
        # A newer temporary folder may be one that is being written in the background.
        removed += [path for path in self._stale(stage) if path.name < loadable[0].name]
        for path in removed:
            _remove(path)
        return removed

    def clean(self, stages: list[str]) -> list[Path]:
        """Remove what interrupted saving left behind; call it while nothing is being saved."""
        removed = [path for stage in stages for path in self._stale(stage)]
        for path in removed:
            _remove(path)
        return removed

    def _stale(self, stage: str) -> list[Path]:
        folder = self.root / stage
        return sorted(folder.glob(f"step_*{PARTIAL}")) if folder.is_dir() else []


def _remove(path: Path) -> None:
    """Rename first, so that a removal that is interrupted leaves no half checkpoint under a final name."""
    if not path.name.endswith(PARTIAL):
        path = path.rename(path.with_name(path.name + PARTIAL))
    shutil.rmtree(path, ignore_errors=True)
