"""Every command that writes what must not be lost, made small, with what must hold after a crash in the midst of it."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import sys
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path

from flm_megatron.checkpoint.files.destination import PARTIAL
from flm_megatron.cli.main import main
from flm_megatron.config.loader import load_run
from flm_megatron.config.schema import RunConfig
from flm_megatron.data.corpus.description import read_description
from flm_megatron.errors import FlmError
from flm_megatron.launch.preflight import resolve
from tests.crash.checks import RunHistory, check_folder, check_log, check_run, digests
from tests.crash.events import Event, SyncBegins, SyncEnds
from tests.crash.file_system import FileSystem
from tests.crash.states import State
from tests.support.prose import prose
from tests.support.runs import make_data

RUN = """
output: {output}
tokenizer: {data}/tokenizer.model
data:
  sequence_length: 32
  train: [{{path: {data}/train}}]
  validation: [{{path: {data}/validation}}]
  cache: {output}/cache
defaults:
  global_batch: 4
  tokens: {tokens}
  parallel: {{tensor: 2}}
  optimizer: {{lr: 3.0e-3, min_lr: 1.0e-3}}
  validation: {{interval_steps: 4, samples: 4}}
stages:
  - name: small
    model: {{num_layers: 1, hidden_size: 16, ffn_hidden_size: 24, num_attention_heads: 4}}
  - name: big
    model: {{num_layers: 2, hidden_size: 32, ffn_hidden_size: 48, num_attention_heads: 8}}
    growth: {{hidden: mask, ffn: zero, heads: zero, layers: zero, mask_steps: 3, optimizer_step: birth}}
checkpoint: {{interval_steps: 2, keep_last: 2}}
logging: {{tensorboard: false}}
"""
STAGES = ["small", "big"]
LEASE = re.compile(r"\.lease(\.[0-9a-f]+)?$")
RERUN_EVERY = 50
"""Of the states in which a command's result is absent, one in so many is tried with the same command again."""


@dataclass
class Checks:
    """What must hold in each state: `check` is called with the real folder that it is in, and whether it is sampled.

    For `varied`, `watch` and `owed` see `Explorer`; `finish` is called once, with the folder that the command left.
    `quick` says that a state takes a millisecond, so that many can be checked.
    """

    check: Callable[[Path, State, bool], None]
    varied: Callable[[str], bool] = lambda path: True
    watch: Callable[[int, Event, FileSystem], None] | None = None
    owed: Callable[[int], Hashable] = lambda event: None
    finish: Callable[[Path], None] = lambda root: None
    quick: bool = False


@dataclass
class Operation:
    """A command to be recorded; `root` is the folder whose files are."""

    name: str
    command: list[str]
    root: Path
    checks: Checks


def flm(*arguments: object) -> list[str]:
    """The command line of a command."""
    return [sys.executable, "-m", "flm_megatron.cli.main", *map(str, arguments)]


def on_two(*arguments: object) -> list[str]:
    """The same, on two processes that share the work."""
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29653"]
    return [sys.executable, *torchrun, *flm(*arguments)[1:]]


def make_run(data: Path, output: Path, steps: int, *overrides: str) -> tuple[Path, RunConfig]:
    """A run file of two stages of so many steps each, beside `output`, and what it resolves to."""
    file = output.with_suffix(".yaml")
    file.write_text(RUN.format(data=data, output=output, tokens=steps * 4 * 32))
    return file, resolve(load_run(file, overrides))


class Workshop:
    """What the operations work on, made in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "data").mkdir()
        self.data = make_data(folder / "data")

    def root(self, name: str) -> Path:
        """An empty folder to be recorded."""
        (self.folder / name).mkdir()
        return self.folder / name

    def training(self, name: str, *overrides: str) -> list[Operation]:
        """Two stages with growth between them, once for its checkpoints and once for all else that it writes."""
        root = self.root(name)
        file, run = make_run(self.data, root / "out", 4, *overrides)
        parts = [run_checks(root / "out", run), log_checks(root / "out", run)]
        return [
            Operation(f"{name}: {what}", flm("train", file, *overrides), root, checks)
            for what, checks in zip(("checkpoints", "everything else"), parts, strict=True)
        ]

    def going_on(self, finished: Path) -> Operation:
        """The same with a half-written checkpoint and a damaged one in its way."""
        root = self.root("resume")
        shutil.copytree(finished, root, dirs_exist_ok=True)
        file, run = make_run(self.data, root / "out", 4)
        stage = root / "out" / "checkpoints" / "big"
        shutil.copytree(stage / "step_00000002", stage / f"step_00000003{PARTIAL}")
        os.truncate(stage / f"step_00000003{PARTIAL}" / "__0_0.distcp", 1000)
        os.truncate(stage / "step_00000004" / "__0_0.distcp", 1000)
        return Operation(
            "train again, a newest checkpoint damaged: checkpoints",
            flm("train", file),
            root,
            run_checks(root / "out", run, damaged="step_00000004"),
        )

    def new_folder(self, name: str, command: Callable[..., list[str]], *arguments: object) -> Operation:
        """A command that writes the folder `out`; its name stands as OUT in the arguments."""
        root = self.root(name.replace(" ", "-"))
        return Operation(name, command(*placed(arguments, root / "out")), root, folder_checks(arguments))

    def dataset(self) -> Operation:
        """`flm data build` with a validation share."""
        root, text = self.root("dataset"), self.folder / "text.jsonl"
        text.write_text("".join(f'{{"text": "{" ".join(document.split())}"}}\n' for document in prose(20)))
        options = ("--tokenizer", self.data / "tokenizer.model", "--workers", "2", "--validation-share", "0.3")
        arguments = ("data", "build", text, *options, "--out", "OUT")
        return Operation("data build", flm(*placed(arguments, root / "out")), root, dataset_checks())


def without_leases(events: list[Event]) -> list[Event]:
    """Without leases and claims on them, which mean nothing after a crash: their holder is gone."""
    paths = [[getattr(event, name, "") for name in ("path", "source", "target")] for event in events]
    left_out = [any(LEASE.search(path) for path in found) for found in paths]
    numbers = {e.number for e, out in zip(events, left_out, strict=True) if out and isinstance(e, SyncBegins)}
    ended = [isinstance(event, SyncEnds) and event.number in numbers for event in events]
    return [e for e, out, end in zip(events, left_out, ended, strict=True) if not out and not end]


def placed(arguments: tuple[object, ...], out: Path) -> list[object]:
    """Arguments with OUT replaced."""
    return [out if argument == "OUT" else argument for argument in arguments]


def run_checks(output: Path, run: RunConfig, damaged: str | None = None) -> Checks:
    """Those of a run's checkpoints; `damaged` is the name of one that cannot be loaded."""
    history = RunHistory(STAGES)
    history.begin(output, damaged)
    name = output.name

    def check(folder: Path, state: State, sampled: bool) -> None:
        check_run(folder / name, run, history, state.event, goes_on=sampled)

    def varied(path: str) -> bool:
        return path in ("", name) or path.startswith(f"{name}/checkpoints")

    return Checks(check, varied, history.watch, history.saved_by)


def log_checks(output: Path, run: RunConfig) -> Checks:
    """Those of what else a run writes; what must be there follows from its newest checkpoint."""
    history, name, finished = RunHistory(STAGES), output.name, Finished()

    def check(folder: Path, state: State, sampled: bool) -> None:
        found = [history.place(f"checkpoints/{p.parent.name}/{p.name}") for p in folder.glob(f"{name}/checkpoints/*/*")]
        place = max((place for place in found if place is not None), default=None)
        wanted = (finished.root / name / "metrics.jsonl").read_text().splitlines()
        check_log(folder / name, run, place, wanted)
        for mark in folder.glob(f"{name}/cache/[!.]*/whole"):
            assert digests(mark.parent) == digests(finished.root / name / "cache" / mark.parent.name)

    def varied(path: str) -> bool:
        return not path.startswith(f"{name}/checkpoints")

    return Checks(check, varied, history.watch, history.saved_by, finished.note)


class Finished:
    """What a command left at its end."""

    root: Path

    def note(self, root: Path) -> None:
        """It lies there."""
        self.root = root


def folder_checks(arguments: tuple[object, ...]) -> Checks:
    """Those of a command that writes the folder `out`."""
    finished = Finished()

    def check(folder: Path, state: State, sampled: bool) -> None:
        out = folder / "out"
        if not check_folder(out, digests(finished.root / "out"), finished=state.finished) and sampled:
            again(placed(arguments, out))
            assert out.is_dir() and not list(out.parent.glob(f"{out.name}*{PARTIAL}"))

    return Checks(check, finish=finished.note, quick=True)


def dataset_checks() -> Checks:
    """A dataset is whole, or refused before anything is read of it."""
    finished = Finished()

    def check(folder: Path, state: State, sampled: bool) -> None:
        wanted = digests(finished.root)
        for prefix in ("out", "out_validation"):
            try:
                read_description(folder / prefix)
            except FlmError:
                assert not state.finished, "the command had ended, but its dataset is gone"
                continue
            found = digests(folder)
            assert all(found[f"{prefix}.{s}"] == wanted[f"{prefix}.{s}"] for s in ("bin", "idx", "json"))

    return Checks(check, finish=finished.note, quick=True)


def again(arguments: list[object]) -> None:
    """Run a command in this process."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
        status = main([str(argument) for argument in arguments])
    assert status == 0, errors.getvalue()
