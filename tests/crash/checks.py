"""What must hold in every state that a crash leaves: for a run, for a new folder, for a dataset."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from flm_megatron.checkpoint.opening import open_checkpoint
from flm_megatron.checkpoint.writer import PARTIAL, write_view
from flm_megatron.config.budget import stage_budgets
from flm_megatron.config.schema import RunConfig
from flm_megatron.errors import FlmError
from flm_megatron.training.start import Start, checkpoint_store, find_start
from tests.crash.events import Event, Rename, SyncEnds
from tests.crash.file_system import FileSystem, Folder, files_in

CHECKPOINT = re.compile(r"checkpoints/([^/]+)/step_(\d{8,})")
Place = tuple[int, int]
"""Number of a stage in its run, and step."""


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder for states, in memory where there is such a place: making and removing thousands of them takes long."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder)


def digests(folder: Path) -> dict[str, str]:
    """A hash of every file of a real folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha1(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@dataclass
class RunHistory:
    """What a run had saved at each moment of a recording, from its renames alone; `watch` is given to an Explorer."""

    stages: list[str]
    whole: dict[Place, dict[str, str]] = field(default_factory=dict)
    saved: list[tuple[int, Place]] = field(default_factory=list)
    _renamed: set[Place] = field(default_factory=set)

    def place(self, path: str) -> Place | None:
        """Of which stage and step the checkpoint folder `path` is; none if it is not one."""
        match = CHECKPOINT.fullmatch(path)
        return (self.stages.index(match[1]), int(match[2])) if match else None

    def watch(self, number: int, event: Event, system: FileSystem) -> None:
        """Note a checkpoint that got its final name, and, with the next sync, that its save is over."""
        if isinstance(event, Rename) and (place := self.place(event.target)) is not None:
            folder = system.find(event.target)
            assert isinstance(folder, Folder)
            self.whole[place] = {name: hashlib.sha1(data).hexdigest() for name, data in files_in(folder)}
            self._renamed.add(place)
        elif isinstance(event, SyncEnds):
            self.saved += [(number, place) for place in self._renamed]
            self._renamed.clear()

    def saved_by(self, event: int) -> Place | None:
        """The newest checkpoint whose save was over then."""
        return max((place for number, place in self.saved if number <= event), default=None)


def check_run(folder: Path, run: RunConfig, history: RunHistory, event: int, goes_on: bool = True) -> Place | None:
    """A run goes on from the newest checkpoint that is whole; with `goes_on` it also cleans, saves and prunes there.

    `folder` is the run's output as a crash after `event` leaves it. Returns where it goes on; none if nothing was
    saved yet. Raises AssertionError otherwise, and whatever the program raises that is not an error of its own.
    """
    run = replace(run, output=str(folder))
    found = _whole_checkpoints(folder, history)
    saved = history.saved_by(event)
    assert saved is None or (found and max(found) >= saved), f"{saved} was saved, whole are {sorted(found)}"
    try:
        start = find_start(run)
    except FlmError as error:
        assert not found, f"{sorted(found)} are whole, but: {error}"
        return None
    assert _place_of(start, run) == max(found, default=None), f"{start}, but {sorted(found)} are whole"
    if not found:
        return None
    source = folder / "checkpoints" / run.stages[max(found)[0]].name / f"step_{max(found)[1]:08d}"
    assert start is None or start.source == source
    view = open_checkpoint(source)
    for name in view.tensors:
        view.read(name)
    if goes_on:
        _check_goes_on(run, max(found))
    return max(found)


def _whole_checkpoints(folder: Path, history: RunHistory) -> set[Place]:
    """Checkpoints under their final names whose bytes are all those that were saved."""
    paths = {
        place: path
        for path in folder.glob("checkpoints/*/step_*")
        if (place := history.place(path.relative_to(folder).as_posix())) is not None
    }
    return {place for place, path in paths.items() if digests(path) == history.whole.get(place)}


def _place_of(start: Start | None, run: RunConfig) -> Place | None:
    """The checkpoint that a start goes on from; the end of the run if nothing is left to do."""
    if start is None:
        return len(run.stages) - 1, stage_budgets(run)[-1].steps
    if start.source is None:
        return None
    match = re.fullmatch(r"step_(\d+)", start.source.name)
    assert match is not None
    return [stage.name for stage in run.stages].index(start.source.parent.name), int(match[1])


def _check_goes_on(run: RunConfig, place: Place) -> None:
    """Clean, save the next step, prune: the new checkpoint is found, and nothing else is lost on the way."""
    store, names = checkpoint_store(run), [stage.name for stage in run.stages]
    store.clean(names)
    stage, step = names[place[0]], place[1] + 1
    source = open_checkpoint(store.path(stage, place[1]))
    write_view(source, store.path(stage, step), {**source.manifest, "step": step})
    store.prune(stage, keep_last=2)
    assert store.latest(names) == store.path(stage, step)
    assert store.path(stage, place[1]).is_dir(), "the checkpoint before the newest was pruned"
    assert not list(store.root.glob(f"*/*{PARTIAL}")), "something half-written was left behind"


def check_folder(folder: Path, wanted: dict[str, str], finished: bool, again: Callable[[Path], None]) -> bool:
    """A new folder is there with all of its bytes, or not at all, and then the same command makes it.

    `wanted` are `digests` of what the command writes (those of files that differ from time to time left out);
    `again` runs it. Returns whether the folder was there.
    """
    there = folder.exists()
    assert there or not finished, "the command had ended, but what it wrote is gone"
    if not there:
        again(folder)
    found = digests(folder)
    assert {name: found.get(name) for name in wanted} == wanted, "under its final name, but not whole"
    return there
