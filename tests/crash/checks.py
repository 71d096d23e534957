"""What must hold in every state that a crash leaves: for a run, for a new folder, for a dataset."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from flm_megatron.checkpoint.files.destination import PARTIAL
from flm_megatron.checkpoint.manifest import Manifest
from flm_megatron.checkpoint.opening import open_checkpoint
from flm_megatron.checkpoint.torch_dist.writer import copy_checkpoint
from flm_megatron.config.budget import stage_budgets
from flm_megatron.config.loader import load_run
from flm_megatron.config.schema import RunConfig
from flm_megatron.errors import FlmError
from flm_megatron.training.metrics.events import StepEvent, parse_line
from flm_megatron.training.metrics.log import MetricsLog
from flm_megatron.training.resume.start import Start, checkpoint_store, find_start
from tests.crash.events import Event, Rename, SyncEnds
from tests.crash.file_system import FileSystem, Folder, files_in

CHECKPOINT = re.compile(r"(?:.*/)?checkpoints/([^/]+)/step_(\d{8,})(?:\.(\d+))?")
Place = tuple[int, int, int]
"""Number of a stage in its run, step, and how often that was saved before."""


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

    def begin(self, output: Path, damaged: str | None = None) -> None:
        """Checkpoints that are there before the recording begins, but for the one called `damaged`."""
        for path in output.glob("checkpoints/*/step_*"):
            place = self.place(f"checkpoints/{path.parent.name}/{path.name}")
            if place is not None and path.name != damaged:
                self.whole[place] = digests(path)
                self.saved.append((0, place))

    def place(self, path: str) -> Place | None:
        """Of which stage and step the checkpoint folder `path` is; none if it is not one."""
        match = CHECKPOINT.fullmatch(path)
        return (self.stages.index(match[1]), int(match[2]), int(match[3] or 0)) if match else None

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
    newest = max(found, default=None)
    assert _reached(start, run) == (newest[:2] if newest else None), f"{start}, but {sorted(found)} are whole"
    if newest is None:
        return None
    assert start is None or start.source == found[newest]
    checkpoint = open_checkpoint(found[newest])
    for name in checkpoint.tensors:
        checkpoint.read(name)
    if goes_on:
        _check_goes_on(run, found[newest])
    return newest


def _whole_checkpoints(folder: Path, history: RunHistory) -> dict[Place, Path]:
    """Checkpoints under their final names whose bytes are all those that were saved."""
    paths = {history.place(path.as_posix()): path for path in folder.glob("checkpoints/*/step_*")}
    return {p: path for p, path in paths.items() if p is not None and digests(path) == history.whole.get(p)}


def _reached(start: Start | None, run: RunConfig) -> tuple[int, int] | None:
    """Stage and step that a start goes on from; the end of the run if nothing is left to do; none for a beginning."""
    if start is None:
        return len(run.stages) - 1, stage_budgets(run)[-1].steps
    if start.source is None:
        return None
    match = CHECKPOINT.fullmatch(start.source.as_posix())
    assert match is not None
    return [stage.name for stage in run.stages].index(match[1]), int(match[2])


def _check_goes_on(run: RunConfig, path: Path) -> None:
    """Clean, save the next step, prune: the new checkpoint is found, and nothing else is lost on the way."""
    store, names = checkpoint_store(run), [stage.name for stage in run.stages]
    store.clean(names)
    source = open_checkpoint(path)
    at = source.manifest.position
    assert at.stage is not None and at.step is not None
    stage, step = at.stage, at.step + 1
    new = store.new_path(stage, step, {entry.name for entry in path.parent.iterdir()})
    copy_checkpoint(source, new, source.manifest | Manifest(position=replace(at, step=step)))
    store.prune(stage, keep_last=2)
    assert store.latest(names) == new
    assert path.is_dir(), "the checkpoint before the newest was pruned"
    assert not list(store.root.glob(f"*/*{PARTIAL}")), "something half-written was left behind"


def check_log(folder: Path, run: RunConfig, place: Place | None, wanted: list[str]) -> None:
    """Metrics of all steps up to the checkpoint at `place` are there, and the rest is as good as new.

    `wanted` are the lines that an undisturbed run leaves. Sample indices are whole where they are marked so, and the
    run file is whole or absent.
    """
    names = [stage.name for stage in run.stages]
    if place is not None:
        MetricsLog(folder, False, names, names[place[0]], place[1]).close()
        kept = (folder / "metrics.jsonl").read_text().splitlines()
        steps = [(line, event) for line in wanted if isinstance(event := parse_line(line), StepEvent)]
        owed = [line for line, event in steps if (names.index(event.stage), event.step) <= place[:2]]
        assert set(owed) <= set(kept), f"{len(set(owed) - set(kept))} of {len(owed)} steps are gone from the metrics"
    if (folder / "run.yaml").exists():
        assert load_run(folder / "run.yaml").stages == run.stages


def check_folder(folder: Path, wanted: dict[str, str], finished: bool) -> bool:
    """A new folder is there with all of its bytes, or not at all; after the command's end it is there.

    `wanted` are the `digests` of what the command writes. Returns whether the folder was there.
    """
    assert folder.exists() or not finished, "the command had ended, but what it wrote is gone"
    assert not folder.exists() or digests(folder) == wanted, "under its final name, but not whole"
    return folder.exists()
