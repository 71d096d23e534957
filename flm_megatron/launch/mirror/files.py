"""What of an output folder is kept in a store: all but what is hidden or half written; checkpoints by manifest."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from flm_megatron.checkpoint.files.destination import PARTIAL
from flm_megatron.checkpoint.files.manifest import MANIFEST
from flm_megatron.checkpoint.store import STEP
from flm_megatron.checkpoint.torch_dist.common import COMMON

BROUGHT = ".brought"
"""Suffix of a file while it is brought from the store."""


@dataclass(frozen=True)
class LocalFile:
    """A file below the folder: its name there, and what changes when it is written."""

    name: str
    size: int
    changed_ns: int


def local_files(folder: Path) -> dict[str, LocalFile]:
    """The files to keep, by their names below `folder`. One that goes meanwhile is left out."""
    found: dict[str, LocalFile] = {}
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if is_kept(name)]
        for name in names:
            path = Path(parent, name)
            if not is_kept(path.relative_to(folder).as_posix()):
                continue
            try:
                stat = path.stat()
            except OSError:
                continue
            below = path.relative_to(folder).as_posix()
            found[below] = LocalFile(below, stat.st_size, stat.st_mtime_ns)
    return found


def is_kept(name: str) -> bool:
    """Whether a file or folder below the output folder is kept in the store; of checkpoints hidden ones are too."""
    path = PurePosixPath(name)
    if path.name.endswith((PARTIAL, BROUGHT)):
        return False
    return not path.name.startswith(".") or in_a_step(name)


def in_a_step(name: str) -> bool:
    """Whether a file is of a checkpoint, which may be half there."""
    return any(STEP.fullmatch(part) for part in PurePosixPath(name).parts[:-1])


def checkpoints_of(names: Iterable[str]) -> set[str]:
    """The folders among `names` that have a manifest, which alone makes a checkpoint exist."""
    return {str(PurePosixPath(name).parent) for name in names if PurePosixPath(name).name == MANIFEST}


def checkpoint_of(name: str, checkpoints: set[str]) -> str | None:
    """The checkpoint that a file belongs to; none for others."""
    return next((str(parent) for parent in PurePosixPath(name).parents if str(parent) in checkpoints), None)


def in_order(names: Iterable[str], checkpoints: set[str]) -> Iterator[str]:
    """Metrics and the like first, then each checkpoint, its manifest last: what is there was trained with metrics.

    First of a checkpoint is COMMON, which tells readers that one without a manifest is half and not another program's.
    """

    def place(name: str) -> tuple[str, bool, bool, str]:
        own = PurePosixPath(name).name
        return checkpoint_of(name, checkpoints) or "", own == MANIFEST, own != COMMON, name

    yield from sorted(names, key=place)
