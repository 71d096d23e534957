"""Records commands with all their processes, enumerates what a crash may leave of them, and resumes from each state.

    python benchmarks/reliability/crash_states.py --out benchmarks/reliability/crash_states.md

Needs `strace`. Everything is made small, in a temporary folder.
"""

from __future__ import annotations

import argparse
import logging
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.crash.checks import scratch
from tests.crash.events import Event, SyncBegins, Write
from tests.crash.operations import RERUN_EVERY, Operation, Workshop, flm, on_two, without_leases
from tests.crash.states import Explorer
from tests.crash.strace_recorder import record

QUICK = 20
"""Times as many states are made where checking one is quick."""
HEADER = (
    "| operation | calls that change files | of them writes, syncs | states of a kill | states of a power cut | "
    "enumerated in full at | wrong | s |\n|---|---|---|---|---|---|---|---|\n"
)


@dataclass
class Row:
    """What was found for one operation."""

    name: str
    events: list[Event]
    kills: int = 0
    power_cuts: int = 0
    moments: int = 0
    sampled: int = 0
    seconds: float = 0.0
    wrong: list[str] = field(default_factory=list)

    def line(self) -> str:
        """A line of the table."""
        writes = sum(isinstance(event, Write) for event in self.events)
        syncs = sum(isinstance(event, SyncBegins) for event in self.events)
        full = f"{self.moments - self.sampled} of {self.moments} moments"
        counts = f"{len(self.events) - syncs:,} | {writes:,}, {syncs:,} | {self.kills:,} | {self.power_cuts:,}"
        return f"| {self.name} | {counts} | {full} | {len(self.wrong)} | {self.seconds:.0f} |"


def explore(operation: Operation, events: list[Event], before: Path, after: Path, limit: int) -> Row:
    """Check every state of a recording that began with the folder `before` and ended with `after`."""
    row, began = Row(operation.name, events), time.monotonic()
    checks = operation.checks
    checks.finish(after)
    explorer = Explorer(before, checks.varied, limit * (QUICK if checks.quick else 1), checks.watch, checks.owed)
    with scratch() as folder:
        for number, state in enumerate(explorer.states(events)):
            state.tree.write(folder / "state")
            try:
                checks.check(folder / "state", state, number % RERUN_EVERY == 0)
            except Exception as error:
                row.wrong.append(f"after event {state.event}: {type(error).__name__}: {error}")
            shutil.rmtree(folder / "state")
            row.power_cuts, row.kills = row.power_cuts + state.power_cut, row.kills + (not state.power_cut)
    row.moments, row.sampled = explorer.moments, explorer.sampled_moments
    row.seconds = time.monotonic() - began
    return row


def recorded(operation: Operation) -> tuple[list[Event], Path]:
    """The events of a command, and a copy of the folder from before it."""
    before = operation.root.with_name(operation.root.name + "-before")
    shutil.copytree(operation.root, before)
    events = record(operation.command, operation.root)
    return without_leases(events), before


def operations(shop: Workshop) -> Iterator[list[Operation]]:
    """All of them, in an order in which each finds what it needs; operations of one list share a recording."""
    yield shop.training("train")
    yield shop.training("train-asynchronous", "--checkpoint.asynchronous", "true")
    done = shop.folder / "train"
    checkpoints = done / "out" / "checkpoints"
    yield [shop.going_on(done)]
    small, big = checkpoints / "small" / "step_00000004", checkpoints / "big" / "step_00000004"
    run = done / "out.yaml"
    yield [shop.new_folder("grow", flm, "grow", small, run, "--stage", "big", "--out", "OUT")]
    yield [shop.new_folder("reshard on two processes", on_two, "checkpoint", "reshard", big, "OUT", "--tensor", "2")]
    yield [shop.new_folder("reshard, classic", flm, "checkpoint", "reshard", small, "OUT", "--format", "classic")]
    yield [
        shop.new_folder("export-hf", flm, "checkpoint", "export-hf", big, "OUT", "--fold-mask", "--shard-size", "20KB")
    ]
    exported = shop.folder / "export-hf" / "out"
    yield [shop.new_folder("import-hf", flm, "checkpoint", "import-hf", exported, "OUT")]
    yield [shop.dataset()]


def with_rows(page: str, rows: list[Row]) -> str:
    """The page with these rows of its table made new."""
    begin = page.index(HEADER) + len(HEADER)
    end = page.index("\n\n", begin)
    lines = {line.split("|")[1].strip(): line for line in page[begin:end].splitlines()}
    lines |= {row.name: row.line() for row in rows}
    return page[:begin] + "\n".join(lines.values()) + page[end:]


def main() -> int:
    """Print the table as it comes; write the page if asked to. Returns 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--limit",
        type=int,
        default=2000,
        help=f"most states of one moment of a power cut; {QUICK} times as many of tools",
    )
    parser.add_argument("--only", default="", help="operations whose name matches this pattern")
    parser.add_argument("--out", type=Path, help="page whose table gets the rows")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    rows = []
    print(HEADER, end="")
    with tempfile.TemporaryDirectory() as folder:
        for group in operations(Workshop(Path(folder))):
            events, before = recorded(group[0])
            for operation in group:
                if re.search(args.only, operation.name):
                    rows.append(explore(operation, events, before, operation.root, args.limit))
                    print(rows[-1].line(), flush=True)
                    for line in rows[-1].wrong[:5]:
                        print("   ", line, flush=True)
    if args.out:
        args.out.write_text(with_rows(args.out.read_text(), rows))
    return int(any(row.wrong for row in rows))


if __name__ == "__main__":
    sys.exit(main())
