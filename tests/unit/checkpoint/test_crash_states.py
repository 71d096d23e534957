"""A file system that promises no more than POSIX, and what it may leave of saving, pruning and the like."""

from __future__ import annotations

import itertools
import json
import pickle
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from operator import attrgetter
from pathlib import Path

import pytest
import torch

from flm_megatron.checkpoint.manifest import Manifest
from flm_megatron.checkpoint.store import CheckpointStore
from flm_megatron.checkpoint.torch_dist.writer import copy_checkpoint
from flm_megatron.cli.main import main
from flm_megatron.config.loader import run_to_dict
from flm_megatron.config.schema import DataConfig, ModelConfig, RunConfig, StageConfig
from flm_megatron.data.corpus.build import build_dataset
from flm_megatron.data.corpus.description import read_description
from flm_megatron.durable import replace_file
from flm_megatron.errors import FlmError
from flm_megatron.training.metrics.log import MetricsLog
from tests.crash import strace_recorder
from tests.crash.checks import RunHistory, check_run, digests, scratch
from tests.crash.events import Event, MakeFolder, Open, Remove, Rename, SyncBegins, SyncEnds, Write
from tests.crash.file_system import FileSystem
from tests.crash.python_recorder import PythonRecorder
from tests.crash.states import Explorer, Tree
from tests.support import data_cases
from tests.support.checkpoint_cases import Memory

MODEL = ModelConfig(1, 8, 8, 1, vocab_size=16)
RUN = RunConfig(
    stages=[StageConfig(name="s", model=MODEL, tokens=32 * 999)], data=DataConfig(sequence_length=32, train=[])
)


def sync(path: str, number: int = 1) -> list[Event]:
    """A whole fsync."""
    return [SyncBegins(path, number), SyncEnds(number)]


@pytest.fixture
def folder() -> Iterator[Path]:
    """An empty folder in memory."""
    with scratch() as folder:
        yield folder


def contents(folder: Path, events: list[Event]) -> set[tuple[tuple[str, bytes], ...]]:
    """The files in each state that a power cut after these events may leave."""
    system = FileSystem(folder)
    for event in events:
        system.apply(event)
    return {tuple(sorted(_files(tree))) for tree in Explorer(folder).power_cuts(system)}


def _files(tree: Tree, prefix: str = "") -> Iterator[tuple[str, bytes]]:
    for name, node in tree.entries.items():
        if isinstance(node, Tree):
            yield from _files(node, f"{prefix}{name}/")
        else:
            yield prefix + name, node.data


NEW = [Open("f"), Write("f", 0, b"abcd")]


@pytest.mark.parametrize(
    ("events", "wanted"),
    [
        (NEW, [{}, {"f": b""}, {"f": b"ab"}, {"f": b"\0\0\0\0"}, {"f": b"abcd"}]),
        ([*NEW, *sync("f")], [{}, {"f": b"abcd"}]),
        ([*NEW, *sync("f", 1), *sync("", 2)], [{"f": b"abcd"}]),
        # A write after the beginning of a sync is not covered by it.
        (
            [Open("f"), *sync(""), SyncBegins("f", 2), Write("f", 0, b"ab"), SyncEnds(2)],
            [{"f": b""}, {"f": b"a"}, {"f": b"\0\0"}, {"f": b"ab"}],
        ),
        # A rename in one folder is whole or not at all, one between folders is not.
        ([*NEW, *sync("f", 1), *sync("", 2), Rename("f", "g")], [{"f": b"abcd"}, {"g": b"abcd"}]),
        (
            [MakeFolder("d"), *NEW, *sync("f", 1), *sync("", 2), Rename("f", "d/f")],
            [{}, {"f": b"abcd"}, {"d/f": b"abcd"}, {"f": b"abcd", "d/f": b"abcd"}],
        ),
        # A name in a folder is of no use without the folder's own.
        ([MakeFolder("d"), Open("d/f"), *sync("d")], [{}, {"d/f": b""}]),
        # A file that takes another's name: what the old one held is gone or there, never mixed with the new one.
        ([*NEW, *sync("f", 1), *sync("", 2), Remove("f"), Open("f")], [{"f": b"abcd"}, {}, {"f": b""}]),
    ],
)
def test_what_is_not_synchronised_may_be_lost(
    tmp_path: Path, events: list[Event], wanted: list[dict[str, bytes]]
) -> None:
    """Enumerated by hand."""
    assert contents(tmp_path, events) == {tuple(sorted(files.items())) for files in wanted}


def save_and_prune(root: Path) -> None:
    """Two saves of which the last is kept."""
    store, checkpoint = CheckpointStore(root / "checkpoints"), Memory({"a": torch.ones(3, 2), "b": torch.zeros(5)})
    for step in (1, 2):
        copy_checkpoint(
            checkpoint, store.path("s", step), Manifest.from_json({"run": run_to_dict(RUN), "step": step, "stage": "s"})
        )
        store.prune("s", keep_last=1)


def recorded(root: Path, work: Callable[[Path], object]) -> list[Event]:
    """What `work(root)` does to files."""
    with PythonRecorder(root).recording() as events:
        work(root)
    return events


def failures(events: list[Event], folder: Path) -> Iterator[str | None]:
    """For each state of a run that lay in no folder before: what is wrong, or none."""
    (folder / "before").mkdir()
    history = RunHistory(["s"])
    explorer = Explorer(folder / "before", watch=history.watch, owed=history.saved_by)
    for number, state in enumerate(explorer.states(events)):
        state.tree.write(folder / "state")
        try:
            yield check_run(folder / "state", RUN, history, state.event, goes_on=number % 20 == 0) and None
        except AssertionError as error:
            yield str(error)
        shutil.rmtree(folder / "state")
    assert not explorer.sampled_moments


@pytest.fixture(scope="module")
def saving(tmp_path_factory: pytest.TempPathFactory) -> list[Event]:
    """The events of `save_and_prune`."""
    return recorded(tmp_path_factory.mktemp("root"), save_and_prune)


def test_from_every_crash_of_saving_and_pruning_a_run_goes_on(saving: list[Event], folder: Path) -> None:
    found = list(failures(saving, folder))
    assert set(found) == {None} and len(found) > 300
    assert sum(isinstance(event, Rename) for event in saving) == 3  # two saves and one removal


SYNCED = [".distcp", ".distcp.crc32", "/.metadata", "/metadata.json", "/common.pt", "/manifest.json"]
SYNCED += [r"/step_00000001~\w+.partial", "checkpoints/s", "checkpoints"]


@pytest.mark.parametrize("left_out", SYNCED)
def test_without_any_one_of_its_syncs_something_is_lost(saving: list[Event], folder: Path, left_out: str) -> None:
    """So that the test above can fail."""
    numbers = {e.number for e in saving if isinstance(e, SyncBegins) and re.search(f"{left_out}$", e.path)}
    kept = [e for e in saving if not isinstance(e, SyncBegins | SyncEnds) or e.number not in numbers]
    assert numbers and any(failures(kept, folder))


SCRIPT = """
import pickle, sys
from pathlib import Path
from tests.unit.checkpoint.test_crash_states import recorded, save_and_prune
Path(sys.argv[2]).write_bytes(pickle.dumps(recorded(Path(sys.argv[1]), save_and_prune)))
"""


@pytest.mark.skipif(not strace_recorder.available(), reason="needs strace")
def test_both_recorders_see_the_same(tmp_path: Path) -> None:
    root, pickled = tmp_path / "root", tmp_path / "events"
    root.mkdir()
    command = [sys.executable, "-c", SCRIPT, str(root), str(pickled)]
    seen = strace_recorder.record(command, root)
    assert _in_order(seen) == _in_order(pickle.loads(pickled.read_bytes()))


def _in_order(events: list[Event]) -> list[Event]:
    """Threads write the parts of a shard at the same time: its writes between two other events, by their place."""
    out: list[Event] = []
    for kind, group in itertools.groupby(events, type):
        run = list(group)
        out += sorted(run, key=attrgetter("offset")) if kind is Write else run
    return out


def end_states(root: Path, work: Callable[[Path], object], folder: Path) -> Iterator[Path]:
    """Every state that a crash during `work(root)` may leave, as a real folder that is gone after its turn."""
    shutil.copytree(root, folder / "before")
    for state in Explorer(folder / "before").states(recorded(root, work)):
        state.tree.write(folder / "state")
        yield folder / "state"
        shutil.rmtree(folder / "state")


def test_a_file_that_is_replaced_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "run.yaml").write_bytes(b"old")
    states = end_states(root, lambda root: replace_file(root / "run.yaml", b"new one"), tmp_path)
    assert {(state / "run.yaml").read_bytes() for state in states} == {b"old", b"new one"}


def metrics_log(root: Path) -> MetricsLog:
    """A log opened again at step 2 of stage s."""
    return MetricsLog(root, False, ["s"], "s", 2)


def test_metrics_of_steps_before_a_checkpoint_outlive_a_power_cut(tmp_path: Path) -> None:
    """When a run goes on its metrics are rewritten, and a checkpoint's save begins after theirs."""
    root = tmp_path / "root"
    root.mkdir()
    lines = [json.dumps({"stage": "s", "step": step}) + "\n" for step in (1, 2, 3)]
    (root / "metrics.jsonl").write_text("".join(lines))

    def go_on(root: Path) -> None:
        log = metrics_log(root)
        log.record({"stage": "s", "step": 3, "loss": 1.0})
        log.sync()
        (root / "saved").mkdir()
        log.record({"stage": "s", "step": 4, "loss": 1.0})
        log.close()

    for state in end_states(root, go_on, tmp_path):
        if (state / "saved").exists():
            assert '"step": 3, "loss"' in (state / "metrics.jsonl").read_text()
        metrics_log(state).close()
        assert (state / "metrics.jsonl").read_text() == "".join(lines[:2])


def test_a_dataset_is_whole_or_refused(tmp_path: Path, folder: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    model, texts, found = data_cases.tokenizer(tmp_path), data_cases.texts(20), set()
    for state in end_states(root, lambda root: build_dataset(texts, model, root / "set"), folder):
        try:
            read_description(state / "set")
        except FlmError:
            found.add("refused")
        else:
            assert digests(state).items() >= digests(root).items()
            found.add("whole")
    assert found == {"refused", "whole"}


def test_chosen_conversations_are_all_there_or_none(tmp_path: Path, folder: Path) -> None:
    root, pool = tmp_path / "root", tmp_path / "pool.jsonl"
    root.mkdir()
    asked = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Forty-two."}]
    pool.write_text(json.dumps({"messages": asked}) + "\n")
    command, there = ["data", "screen", str(pool), "--out", str(root / "out")], set()
    for state in end_states(root, lambda root: main(command), folder):
        there.add((state / "out").exists())
        assert not (state / "out").exists() or digests(state / "out") == digests(root / "out")
    assert there == {False, True} and len(digests(root / "out")) == 4
