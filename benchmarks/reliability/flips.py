"""Flips random bits in all kinds of files of a checkpoint and of a dataset; says what every reader of them does.

    python benchmarks/reliability/flips.py --flips 200 --out benchmarks/reliability/flips.md

The checkpoint is one of a run on two processes. It is read in this process by the code of the commands; of training
only the steps are left out. A reader must refuse the damage, naming the file or a tensor, with status 1 (at resume:
go on from the checkpoint before), or give the very same result as without the flip, because it does not use that bit.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import logging
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from flm_megatron.cli.main import main as flm_main
from flm_megatron.config.loader import dump_run
from flm_megatron.config.schema import DistributedConfig, ParallelConfig, RunConfig
from flm_megatron.data.corpus.source import Source
from flm_megatron.data.corpus.verify import verify_dataset
from flm_megatron.distributed.signals import StopRequest
from flm_megatron.distributed.world import world
from flm_megatron.errors import DamagedError, FlmError
from flm_megatron.training.resume.start import find_start
from flm_megatron.training.stage import StageTrainer, train_stage
from tests.crash.checks import digests, scratch
from tests.crash.operations import flm, make_run
from tests.support.runs import make_data

NEWEST, BEFORE = "step_00000004", "step_00000002"
# Each process's file has several blocks of a MiB, so that a reader need not meet every one.
SIZES = ["0.model.hidden_size 128", "0.model.ffn_hidden_size 256", "1.model.hidden_size 192"]
SIZES += ["1.model.ffn_hidden_size 320", "1.model.num_attention_heads 6"]
SETTINGS = [word for size in SIZES for word in f"--stages.{size}".split()] + ["--checkpoint.keep_last", "9"]
FOUND, FELL_BACK, SAME = "refused by name", "went on from the one before", "bit not used, same result"
ALLOWED = (FOUND, FELL_BACK, SAME)


@dataclass(frozen=True)
class Flip:
    """A bit of a file."""

    file: str
    byte: int
    bit: int

    def apply(self, folder: Path) -> None:
        """Flip it."""
        data = bytearray((folder / self.file).read_bytes())
        data[self.byte] ^= 1 << self.bit
        (folder / self.file).write_bytes(data)


def flips(folder: Path, names: list[str], count: int, draw: random.Random) -> Iterator[Flip]:
    """So many, the files in turn."""
    for number in range(count):
        name = names[number % len(names)]
        yield Flip(name, draw.randrange((folder / name).stat().st_size), draw.randrange(8))


class Case:
    """A run with two checkpoints of its first stage, and the readers of the newest."""

    def __init__(self, folder: Path) -> None:
        self.data = make_data(_made(folder / "data"))
        file, _ = make_run(self.data, folder / "whole", 6, *SETTINGS)
        subprocess.run(flm("train", file, *SETTINGS, "--stage", "small"), check=True, capture_output=True)
        self.whole, self.folder = folder / "whole", folder
        self.text = folder / "text.txt"
        self.text.write_text("A tensor is cut along its rows. " * 20)
        self.readers: dict[str, Callable[[Path], str]] = {
            "resume": self.resume,
            "growth": lambda output: self.tool(output, "grow", "NEWEST", "RUN", "--stage", "big", "--out", "OUT"),
            "export-hf": lambda output: self.tool(output, "checkpoint", "export-hf", "NEWEST", "OUT"),
            "reshard": lambda output: self.tool(output, "checkpoint", "reshard", "NEWEST", "OUT"),
            "eval bpb": self.evaluate,
            "verify": lambda output: self.tool(output, "checkpoint", "verify", "NEWEST"),
        }
        self.wanted: dict[str, str] = {}

    def copy(self) -> Path:
        """The run with its two checkpoints: its output folder, always at the same place, for manifests name it."""
        shutil.rmtree(self.folder / "run", ignore_errors=True)
        stage = self.folder / "run" / "checkpoints" / "small"
        for name in (BEFORE, NEWEST):
            shutil.copytree(self.whole / "checkpoints" / "small" / name, stage / name)
        return self.folder / "run"

    def run(self, output: Path) -> tuple[Path, RunConfig]:
        """Its run file, on one process."""
        file, run = make_run(self.data, output, 6, *SETTINGS, "--data.cache", str(self.folder / "cache"))
        run = replace(run, stages=[replace(stage, parallel=ParallelConfig()) for stage in run.stages])
        file.write_text(dump_run(run))
        return file, run

    def resume(self, output: Path) -> str:
        """What a run that goes on has in its memory, found and loaded as `flm train` does; and from which step."""
        _, run = self.run(output)
        while True:
            start = find_start(run)
            assert start is not None
            try:
                with world(DistributedConfig(), 0, 1, f"file://{tempfile.mktemp(dir=self.folder)}"):
                    train_stage(run, start)
                return f"{start.step} {LOADED.pop()}"
            except DamagedError:
                if find_start(run) == start:
                    raise

    def tool(self, output: Path, *arguments: str) -> str:
        """What a command writes."""
        file, _ = self.run(output)
        out = output / "out"
        names = {"NEWEST": output / "checkpoints" / "small" / NEWEST, "RUN": file, "OUT": out}
        printed = command([str(names.get(argument, argument)) for argument in arguments])
        return str(sorted(digests(out).items())) if out.exists() else printed.replace(str(output), "")

    def evaluate(self, output: Path) -> str:
        """Bits per byte of a text."""
        return self.tool(output, "eval", "bpb", "NEWEST", "--text", f"text={self.text}", "--json", str(output / "out"))

    def outcome(self, reader: str, flip: Flip) -> str:
        """What a reader does with a flipped bit."""
        output = self.copy()
        flip.apply(output / "checkpoints" / "small" / NEWEST)
        try:
            got = self.readers[reader](output)
        except FlmError as error:
            named = flip.file in str(error) or "layers" in str(error) or "weight" in str(error)
            return FOUND if error.status == 1 and named else f"status {error.status}: {error}"
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        if got == self.wanted[reader]:
            return SAME
        return FELL_BACK if got == self.wanted.get("before") else "ANOTHER RESULT"

    def prepare(self) -> None:
        """What each reader gives without a flip; twice, so that what differs by itself is seen."""
        StageTrainer.train = only_load  # type: ignore[assignment, method-assign]
        for reader, read in self.readers.items():
            results = [read(self.copy()) for _ in range(2)]
            assert results[0] == results[1], f"{reader} differs by itself"
            self.wanted[reader] = results[0]
        output = self.copy()
        shutil.rmtree(output / "checkpoints" / "small" / NEWEST)
        self.wanted["before"] = self.resume(output)


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


LOADED: list[str] = []
"""What stages have begun with."""


def only_load(trainer: StageTrainer, stop: StopRequest) -> bool:
    """In the place of a stage's steps: note what it begins with."""
    LOADED.append(state_digest(trainer))
    return True


def state_digest(trainer: Any) -> str:
    """A hash of all weights and of the optimizer's state."""
    found = hashlib.sha256()
    for chunk in trainer.state.chunks:
        for parameter in chunk.parameters():
            found.update(parameter.detach().contiguous().view(torch.uint8).numpy().tobytes())
    for name, value in sorted(tensors_in(trainer.state.optimizer.state_dict())):
        found.update(name.encode() + value.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def tensors_in(value: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors of a nested state, with dimensions, by name."""
    if isinstance(value, torch.Tensor) and value.ndim:
        yield name, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, child in items:
        yield from tensors_in(child, f"{name}/{key}")


def command(arguments: list[str]) -> str:
    """Run a command in this process; what it printed. Raises FlmError with its status where it fails."""
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.redirect_stderr(io.StringIO()) as errors:
        status = flm_main(arguments)
    if status:
        error = FlmError(errors.getvalue() + printed.getvalue())
        error.status = status
        raise error
    return printed.getvalue()


def kind(name: str) -> str:
    """The kind of a checkpoint's file."""
    return "`*.distcp.crc32`" if name.endswith(".crc32") else "`*.distcp`" if name.endswith(".distcp") else f"`{name}`"


def flip_checkpoints(case: Case, count: int, draw: random.Random) -> tuple[str, list[str]]:
    """The table for a checkpoint, and what was not as it must be."""
    case.prepare()
    folder = case.whole / "checkpoints" / "small" / NEWEST
    names = sorted(digests(folder))
    table: dict[str, Counter[tuple[str, str]]] = {}
    wrong = []
    for flip in flips(folder, names, count, draw):
        for reader in case.readers:
            outcome = case.outcome(reader, flip)
            table.setdefault(kind(flip.file), Counter())[reader, outcome if outcome in ALLOWED else "WRONG"] += 1
            if outcome not in ALLOWED:
                wrong.append(f"{flip} {reader}: {outcome}")
                print(wrong[-1], flush=True)
    columns = [(reader, outcome) for reader in case.readers for outcome in (*ALLOWED, "WRONG")]
    columns = [column for column in columns if any(column in counts for counts in table.values())]
    head = "| file | flips | " + " | ".join(f"{reader}: {outcome}" for reader, outcome in columns) + " |\n"
    lines = [
        f"| {name} | {sum(n for (r, _), n in counts.items() if r == 'resume')} | "
        + " | ".join(str(counts[column]) for column in columns) + " |\n"
        for name, counts in sorted(table.items())
    ]  # fmt: skip
    return head + "|---" * (len(columns) + 2) + "|\n" + "".join(lines), wrong


def flip_datasets(case: Case, count: int, draw: random.Random) -> str:
    """The table for a dataset and its tokenizer: what a run that reads every sample sees."""
    table: dict[str, Counter[str]] = {}
    wanted = samples(case, case.data)
    for flip in flips(case.data, ["train.bin", "train.idx", "train.json", "tokenizer.model"], count, draw):
        with scratch() as folder:
            shutil.copytree(case.data, folder / "data")
            flip.apply(folder / "data")
            try:
                outcome = "same samples" if samples(case, folder / "data") == wanted else "other samples, unseen"
            except FlmError as error:
                outcome = f"refused with status {error.status}"
            except Exception as error:
                outcome = f"{type(error).__name__}"
            table.setdefault(flip.file, Counter())[outcome] += 1
            table[flip.file]["found by `flm data verify`"] += is_found(folder / "data" / "train")
    outcomes = sorted({outcome for counts in table.values() for outcome in counts})
    head = "| file | flips | " + " | ".join(outcomes) + " |\n" + "|---" * (len(outcomes) + 2) + "|\n"
    lines = [
        f"| `{name}` | {counts.total() - counts['found by `flm data verify`']} | "
        + " | ".join(str(counts[outcome]) for outcome in outcomes)
        + " |\n"
        for name, counts in table.items()
    ]
    return head + "".join(lines)


def is_found(prefix: Path) -> bool:
    """Whether `flm data verify` refuses a dataset."""
    try:
        verify_dataset(prefix)
    except FlmError:
        return True
    return False


def samples(case: Case, data: Path) -> str:
    """A hash of every sample of a training set, after the checks that a run makes first."""
    from flm_megatron.data.corpus.description import check_datasets
    from flm_megatron.data.tokenizer import open_tokenizer

    _, run = make_run(data, data.parent / "run", 6)
    check_datasets(run.data, open_tokenizer(str(run.tokenizer)))
    with scratch() as cache:
        source = Source(run.data.train[0], 32, 1, str(cache))
        found = hashlib.sha256()
        for number in range(len(source)):
            found.update(source.read(number)["tokens"].numpy().tobytes())
    return found.hexdigest()


def main() -> int:
    """Print both tables; returns 1 if a reader of a checkpoint did what it must not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--flips", type=int, default=200, help="of a checkpoint (0: leave that out)")
    parser.add_argument("--dataset-flips", type=int, default=100, help="of a dataset and its tokenizer")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="page to put the tables into, behind its marks")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    draw = random.Random(args.seed)
    with scratch() as folder:
        case = Case(folder)
        checkpoints, wrong = flip_checkpoints(case, args.flips, draw) if args.flips else ("", [])
        datasets = flip_datasets(case, args.dataset_flips, draw)
    print(checkpoints, datasets, f"{len(wrong)} wrong", sep="\n")
    if args.out:
        text = args.out.read_text()
        for mark, table in (("checkpoint", checkpoints), ("dataset", datasets)):
            if table:
                begin, end = f"<!-- {mark} -->\n", f"<!-- end of {mark} -->"
                text = text[: text.index(begin)] + begin + table + text[text.index(end) :]
        args.out.write_text(text)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
