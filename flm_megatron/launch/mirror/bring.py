"""Brings a run's folder from a store to this machine: its logs, and the newest whole checkpoint of its last stage."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from flm_megatron.checkpoint.files.manifest import MANIFEST, read_manifest
from flm_megatron.checkpoint.store import STEP, CheckpointStore
from flm_megatron.durable import make_folders, sync
from flm_megatron.errors import DamagedError, RequestError
from flm_megatron.launch.mirror.files import BROUGHT, checkpoint_of, checkpoints_of, in_a_step, in_order, is_kept
from flm_megatron.storage.store import ObjectInfo, below, download

CHECKPOINTS = "checkpoints"


def stored(url: str) -> dict[str, ObjectInfo]:
    """What is kept at a URL, by its name below it; hidden things are left out. Raises RequestError."""
    root = url.rstrip("/") + "/"
    names = {found.url.removeprefix(root): found for found in below(url)}
    return {name: found for name, found in names.items() if is_kept(name)}


def bring(objects: dict[str, ObjectInfo], folder: Path, stages: Sequence[str]) -> list[str]:
    """Bring logs and the newest checkpoint of the last of `stages` that has a whole one, of the run and its branches.

    Returns the names of the checkpoints.

    Raises:
        RequestError: the store fails; or objects that were listed are gone.
    """
    checkpoints = checkpoints_of(objects)
    for name in objects:
        if checkpoint_of(name, checkpoints) is None and not in_a_step(name):
            _fetch(objects[name], folder / name)
    roots = {str(PurePosixPath(path).parents[1]) for path in checkpoints if len(PurePosixPath(path).parts) > 1}
    roots = {root for root in roots if PurePosixPath(root).name == CHECKPOINTS}
    found = [_newest(objects, folder, root, stages) for root in sorted(roots)]
    return [path for path in found if path]


def _newest(objects: dict[str, ObjectInfo], folder: Path, root: str, stages: Sequence[str]) -> str | None:
    """Bring the newest whole checkpoint below `root`; returns its name, none if there is none."""
    for stage in reversed(stages):
        steps = [path for path in checkpoints_of(objects) if str(PurePosixPath(path).parent) == f"{root}/{stage}"]
        steps = [path for path in steps if STEP.fullmatch(PurePosixPath(path).name)]
        for path in sorted(steps, key=lambda path: (CheckpointStore.step_of(Path(path)), path), reverse=True):
            if _bring_checkpoint(objects, folder, path):
                return path
    return None


def _bring_checkpoint(objects: dict[str, ObjectInfo], folder: Path, path: str) -> bool:
    """Bring a checkpoint, its manifest last; false if it is not whole in the store."""
    partial = folder / PurePosixPath(path).parent / f".{PurePosixPath(path).name}.manifest"
    _fetch(objects[f"{path}/{MANIFEST}"], partial / MANIFEST)
    try:
        manifest = read_manifest(partial)
    except DamagedError:
        return False
    finally:
        (partial / MANIFEST).unlink(missing_ok=True)
        partial.rmdir()
    wanted = {f"{path}/{name}": entry.size for name, entry in (manifest.files if manifest else {}).items()}
    if any(name not in objects or objects[name].size != size for name, size in wanted.items()):
        return False
    for name in in_order((name for name in objects if name.startswith(f"{path}/")), {path}):
        _fetch(objects[name], folder / name)
    return True


def _fetch(found: ObjectInfo, path: Path) -> None:
    """Bring an object as a file, under its name when it is whole."""
    partial = path.with_name(f".{path.name}{BROUGHT}")
    make_folders(path.parent)
    try:
        download(found, partial)
        partial.replace(path)
    except FileNotFoundError:
        raise RequestError(f"{found.url} is gone since it was listed: try again") from None
    finally:
        partial.unlink(missing_ok=True)
    sync(path.parent)
