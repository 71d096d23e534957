"""The checkpoints of a run: one folder per stage, one folder per saved step in it.

A step that is saved again, because its first checkpoint was damaged and the run went on from an older one, gets
`.1`, `.2`, ... behind its name: nothing that was saved is renamed or overwritten. A checkpoint that was found to be
damaged while it was read has a note beside it, and is passed over from then on.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Collection, Iterator
from itertools import count, islice
from pathlib import Path

from flm_megatron.checkpoint.files.destination import PARTIAL, final_name
from flm_megatron.checkpoint.files.manifest import verify
from flm_megatron.checkpoint.lease.fence import check_fences
from flm_megatron.checkpoint.torch_dist.reader import TorchDistCheckpoint
from flm_megatron.durable import sync, write_file
from flm_megatron.errors import DamagedError, RequestError

logger = logging.getLogger(__name__)
NOTE = ".damage.json"
STEP = re.compile(r"step_(\d{8,})(?:\.(\d+))?")


class CheckpointStore:
    """Checkpoints under `root`/STAGE/step_XXXXXXXX."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self._seen_whole: set[Path] = set()

    def path(self, stage: str, step: int) -> Path:
        """Where the first checkpoint of a step is, whether it exists or not."""
        return self.root / stage / f"step_{step:08d}"

    def new_path(self, stage: str, step: int, taken: Collection[str]) -> Path:
        """Where to save a step: `path`, or with a number appended if that name is in `taken`."""
        first = self.path(stage, step)
        names = (first.name if not again else f"{first.name}.{again}" for again in count())
        return first.with_name(next(name for name in names if name not in taken))

    def taken(self, stage: str) -> tuple[str, ...]:
        """Names that no new checkpoint of a stage can have.

        Those of its checkpoints, whole or not, and of notes whose checkpoint was removed by hand: they would apply to
        another one.
        """
        names = {path.name.removesuffix(NOTE) for path in self._entries(stage)}
        return tuple(sorted(name for name in names if STEP.fullmatch(name)))

    def steps(self, stage: str) -> list[int]:
        """Steps of a stage that have a checkpoint under its final name, oldest first."""
        return sorted({_place(path)[0] for path in self._paths(stage)})

    @staticmethod
    def step_of(path: Path) -> int:
        """The step of a checkpoint under its final name."""
        return _place(path)[0]

    def newest(self, stage: str) -> list[Path]:
        """Checkpoints of a stage under their final names, newest first, whole or not."""
        return self._paths(stage)[::-1]

    def latest(self, stages: list[str]) -> Path | None:
        """The newest loadable checkpoint of the last of `stages` that has one; none if there is none.

        Half-written ones are passed over and, with a warning, damaged ones: a file is missing, of another size, or was
        found to be changed (see `note_damage`). The values themselves are not read. Raises as `search`.
        """
        return self.search(stages)[0]

    def search(self, stages: list[str]) -> tuple[Path | None, list[DamagedError]]:
        """`latest`, and why each newer one was passed over.

        Raises:
            RequestError: one that is not damaged cannot be read: it is of a newer version, or its disk does not answer.
            DamagedError: there are checkpoints, and all of them are damaged.
        """
        damaged: list[DamagedError] = []
        for path in (path for stage in reversed(stages) for path in self.newest(stage)):
            try:
                self._check(path)
                TorchDistCheckpoint(path)
                return path, damaged
            except DamagedError as error:
                logger.warning("passed over: %s", error)
                damaged.append(error)
        if damaged:
            raise DamagedError(
                f"none of the {len(damaged)} checkpoints under {self.root} can be loaded, the newest because of: "
                f"{damaged[0]}; bring one back from a copy, or begin from nothing with `--start-anew`"
            )
        return None, damaged

    def prune(self, stage: str, keep_last: int, keep_every_steps: int = 0) -> list[Path]:
        """Remove old checkpoints of a stage; returns what was removed.

        Kept are the newest `keep_last` that are whole (at least one: the last of a stage is never dropped), those at
        multiples of `keep_every_steps`, and all newer ones. Leftovers of earlier saves go too. Only manifests of those
        kept for being new are read, each once, and none while there are no more than `keep_last`. An error of the disk
        while removing one does not end a run: it is logged, and the next call tries again.
        """
        removed: list[Path] = []
        try:
            for path in self._superfluous(stage, keep_last, keep_every_steps):
                _remove(path)
                self._note(path).unlink(missing_ok=True)
                removed.append(path)
        except (RequestError, OSError) as error:
            logger.warning("old checkpoints of stage %r are not all removed: %s", stage, error)
        return removed

    def _superfluous(self, stage: str, keep_last: int, keep_every_steps: int) -> list[Path]:
        """What `prune` removes."""
        keep, paths, stale = max(1, keep_last), self._paths(stage), self._stale(stage)
        if len(paths) <= keep:
            paths = []  # none is too many, and none needs to be looked at
        whole = list(islice(self._whole(stage), keep if paths else 1)) if paths or stale else []
        if not whole:
            return []
        # A newer temporary folder may be one that is being written in the background.
        older = [path for path in (*paths, *stale) if _place(path) < _place(whole[0])]
        return [path for path in older if path not in whole and not _is_multiple(path, keep_every_steps)]

    def clean(self, stages: list[str]) -> list[Path]:
        """Remove leftovers of interrupted saves; returns them. Call it while nothing is being saved."""
        stale = [path for stage in stages for path in self._stale(stage)]
        for path in stale:
            _remove(path)
        return stale

    def note_damage(self, error: DamagedError) -> None:
        """Pass over the checkpoint in which `error` was found from now on; does nothing if it is not one of these.

        The note lies beside it under its name and `.damage.json`.
        """
        path = error.checkpoint
        if path is None or path.parent.parent.resolve() != self.root.resolve() or not STEP.fullmatch(path.name):
            return
        try:
            write_file(self._note(path), json.dumps({"damage": str(error)}).encode())
        except OSError as problem:  # the damage itself has to be heard of
            logger.warning("%s: cannot be written: %s", self._note(path), problem.strerror or problem)

    def _check(self, path: Path) -> None:
        """Raises as `verify`; DamagedError too for one that has a note, or no manifest."""
        note = self._note(path)
        if note.exists():
            raise DamagedError(
                f"{_noted(note)} (found when it was read; once it is fixed, remove {note})", checkpoint=path
            )
        verify(path, quick=True)

    def _whole(self, stage: str) -> Iterator[Path]:
        """Newest first. One that was whole is not looked at again, but for a note: it may have ten thousand files."""
        for path in self.newest(stage):
            if path not in self._seen_whole or self._note(path).exists():
                try:
                    self._check(path)
                except DamagedError:
                    continue
                self._seen_whole.add(path)
            yield path

    def _paths(self, stage: str) -> list[Path]:
        """Under their final names, oldest first."""
        return sorted((path for path in self._entries(stage) if STEP.fullmatch(path.name)), key=_place)

    def _stale(self, stage: str) -> list[Path]:
        return sorted(path for path in self._entries(stage) if STEP.fullmatch(final_name(path.name) or ""))

    def _entries(self, stage: str) -> list[Path]:
        """What lies in a stage's folder. Raises RequestError where the disk does not answer."""
        folder = self.root / stage
        try:
            return list(folder.iterdir())
        except FileNotFoundError:
            return []
        except OSError as error:
            raise RequestError(f"{folder}: cannot be listed ({error.strerror}): see to its disk first") from error

    def _note(self, path: Path) -> Path:
        return path.with_name((final_name(path.name) or path.name) + NOTE)


def _place(path: Path) -> tuple[int, int]:
    """Step, and number of the save."""
    match = STEP.fullmatch(final_name(path.name) or path.name)
    assert match, f"{path} is not named as a checkpoint"
    return int(match[1]), int(match[2] or 0)


def _is_multiple(path: Path, every: int) -> bool:
    return every > 0 and not path.name.endswith(PARTIAL) and _place(path)[0] % every == 0


def _noted(note: Path) -> str:
    try:
        return str(json.loads(note.read_text(encoding="utf-8"))["damage"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"{note.name.removesuffix(NOTE)} is damaged"


def _remove(path: Path) -> None:
    """Rename first, so that a removal that is interrupted leaves no half checkpoint under a final name.

    The disk must hold the new name before a file goes, or a power cut could leave the old name on what is left.
    """
    check_fences()
    if not path.name.endswith(PARTIAL):
        path = path.rename(path.with_name(path.name + PARTIAL))
        sync(path.parent)
    shutil.rmtree(path, ignore_errors=True)
