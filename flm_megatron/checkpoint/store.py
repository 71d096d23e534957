"""The checkpoints of a run: one folder per stage, one folder per step in it."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from flm_megatron.checkpoint.manifest import verify
from flm_megatron.checkpoint.torch_dist import TorchDistCheckpoint
from flm_megatron.checkpoint.writer import PARTIAL
from flm_megatron.durable import sync
from flm_megatron.errors import FlmError

logger = logging.getLogger(__name__)
DAMAGED = ".damaged"
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

        A half-written one is passed over, and, with a warning, a damaged one (a file missing or of another size).
        """
        return next(self._loadable(stages), None)

    def prune(self, stage: str, keep_last: int, keep_every_steps: int = 0) -> list[Path]:
        """Remove old checkpoints of a stage; returns what was removed.

        Kept are the newest `keep_last` that can be loaded (at least one: the last of a stage is never dropped), those
        at multiples of `keep_every_steps`, and whatever is newer. Left-overs of earlier saves go too.
        """
        loadable = list(self._loadable([stage]))
        if not loadable:
            return []
        # A newer temporary folder may be one that is being written in the background.
        older = [path for path in (*self._paths(stage), *self._stale(stage)) if path.name < loadable[0].name]
        kept = set(loadable[:keep_last])
        if keep_every_steps > 0:
            kept |= {self.path(stage, step) for step in self.steps(stage) if step % keep_every_steps == 0}
        removed = [path for path in older if path not in kept]
        for path in removed:
            _remove(path)
        return removed

    def clean(self, stages: list[str]) -> list[Path]:
        """Make room for going on from `latest`; returns what was moved or removed.

        Call it while nothing is being saved.
        What interrupted saving left behind is removed; a checkpoint that cannot be loaded would be in the way of
        saving its step again, and is kept under a name that ends in `.damaged`.
        """
        stale = [path for stage in stages for path in self._stale(stage)]
        for path in stale:
            _remove(path)
        loadable = set(self._loadable(stages))
        damaged = [path for stage in stages for path in self._paths(stage) if path not in loadable]
        for path in damaged:
            aside = path.with_name(path.name + DAMAGED)
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
        return stale + damaged

    def _loadable(self, stages: list[str]) -> Iterator[Path]:
        for stage in reversed(stages):
            for path in reversed(self._paths(stage)):
                try:
                    verify(path, quick=True)
                    TorchDistCheckpoint(path)
                except FlmError as error:
                    logger.warning("passed over: %s", error)
                    continue
                yield path

    def _paths(self, stage: str) -> list[Path]:
        return [self.path(stage, step) for step in self.steps(stage)]

    def _stale(self, stage: str) -> list[Path]:
        folder = self.root / stage
        return sorted(folder.glob(f"step_*{PARTIAL}")) if folder.is_dir() else []


def _remove(path: Path) -> None:
    """Rename first, so that a removal that is interrupted leaves no half checkpoint under a final name.

    The disk must hold the new name before a file goes, or a power cut could leave the old name on what is left.
    """
    if not path.name.endswith(PARTIAL):
        path = path.rename(path.with_name(path.name + PARTIAL))
        sync(path.parent)
    shutil.rmtree(path, ignore_errors=True)
