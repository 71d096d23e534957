"""Kills a run with signal 9 at random moments until it has come to its end, and compares with one that was let alone.

    python benchmarks/reliability/kills.py --kills 50 --record benchmarks/reliability/kills.jsonl

The run has two stages with growth between them, on two processes. After each kill the same command is given again; a
run that ends is compared (losses, gradient norms and learning rates of every step, and the hash of all tensors of its
last checkpoint), and the next one begins. Results are added to the record as they come: call it again to go on.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parents[2]))

from flm_megatron.checkpoint.opening import open_checkpoint
from flm_megatron.training.metrics.events import MetricsEvent, read_events
from tests.crash.operations import flm, make_run
from tests.support.runs import losses, make_data

STEPS = 6
PATIENCE_S = 240.0


@dataclass
class Attempt:
    """A run that has just been started."""

    output: Path
    process: subprocess.Popen[bytes]

    def family(self) -> list[psutil.Process]:
        """The command's process and all below it."""
        try:
            parent = psutil.Process(self.process.pid)
            return [parent, *parent.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def wait_for(self, seen: Callable[[], bool]) -> bool:
        """Wait until something is seen; false if the run ended first."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            if seen():
                return True
            if self.process.poll() is not None:
                return False
            time.sleep(0.001)
        raise TimeoutError(f"waited {PATIENCE_S} s in {self.output}")


def is_saving(output: Path) -> bool:
    """Whether a checkpoint is being written, or removed."""
    return any(output.glob("checkpoints/*/*.partial"))


def is_removing(output: Path) -> bool:
    """Whether a checkpoint that was whole is being removed: it is older than one under its final name."""
    names = {path.name for path in output.glob("checkpoints/*/step_*")}
    whole = [name for name in names if not name.endswith(".partial")]
    return any(name.endswith(".partial") and name < max(whole, default="") for name in names)


def steps_done(output: Path) -> int:
    """Lines of the metrics."""
    file = output / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def validations(output: Path) -> int:
    """How often the log has a validation loss."""
    file = output / "log.txt"
    return file.read_bytes().count(b"validation loss") if file.exists() else 0


def moment(attempt: Attempt, phase: str, draw: random.Random) -> bool:
    """Wait for a random moment of a phase; false if the run ended before it came."""
    output, begun, validated = attempt.output, steps_done(attempt.output), validations(attempt.output)
    if phase == "start-up":
        time.sleep(draw.uniform(0.0, 6.0))
        return attempt.process.poll() is None
    seen, longest = {
        "steps": (lambda: steps_done(output) > begun, 0.6),
        "saving": (lambda: is_saving(output), 0.03),
        "pruning": (lambda: is_removing(output), 0.002),
        "validation": (lambda: validations(output) > validated, 0.1),
        "boundary": (lambda: (output / "checkpoints" / "small" / f"step_{STEPS:08d}").exists(), 6.0),
        "end": (lambda: (output / "checkpoints" / "big" / f"step_{STEPS:08d}").exists(), 0.3),
    }[phase]
    if not attempt.wait_for(seen):
        return False
    time.sleep(draw.uniform(0.0, longest))
    return attempt.process.poll() is None


def kill(attempt: Attempt, one_rank: bool, draw: random.Random) -> str:
    """Kill everything, or one process below the command's own; returns what was killed. Nothing of it stays."""
    family = attempt.family()
    ranks = [process for process in family[1:] if process.is_running()]
    chosen = [draw.choice(ranks)] if one_rank and ranks else family
    for process in chosen:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)
    attempt.process.wait(PATIENCE_S)
    _, left = psutil.wait_procs(family, timeout=60)
    assert not left, f"still there after the kill: {left}"
    return "one process" if chosen != family else "all processes"


def result(output: Path) -> dict[str, Any]:
    """What must be the same bit by bit."""
    last = open_checkpoint(output / "checkpoints" / "big" / f"step_{STEPS:08d}")
    steps = [list(line) for line in losses(output)]
    return {"steps": steps, "hash": last.manifest.logical_hash}


def start(file: Path, output: Path) -> Attempt:
    """Give the command."""
    log = (output.parent / "stderr.txt").open("ab")
    return Attempt(output, subprocess.Popen(flm("train", file), stdout=log, stderr=log))


PHASES = ("start-up", "steps", "saving", "pruning", "validation", "boundary", "end")


def killed_run(file: Path, output: Path, draw: random.Random, record: Callable[[dict[str, Any]], bool]) -> None:
    """Give the command again and again, each time with a kill, until the run is over; `record` says when to let it."""
    wants_more = True
    while True:
        attempt = start(file, output)
        phase, one_rank = draw.choice(PHASES), draw.random() < 0.4
        if wants_more and moment(attempt, phase, draw):
            events = read_events(output, MetricsEvent) if steps_done(output) else []
            reached = f"{events[-1].stage} {events[-1].step}" if events else "nothing"
            half = is_saving(output)
            what = kill(attempt, one_rank, draw)
            status = attempt.process.returncode
            entry = {"phase": phase, "killed": what, "status": status, "reached": reached, "half_written": half}
            wants_more = record(entry)
            continue
        status = attempt.process.wait(PATIENCE_S)
        assert status == 0, f"status {status}: {(output.parent / 'stderr.txt').read_text()[-2000:]}"
        return


def main() -> int:
    """Returns 1 if a run did not end with the same bits."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="in the record when it ends")
    parser.add_argument("--record", type=Path, required=True, help="file of results, one a line, added to")
    parser.add_argument("--minutes", type=float, default=60.0, help="begin no further kill after so long")
    args = parser.parse_args()
    known = [json.loads(line) for line in args.record.read_text().splitlines()] if args.record.exists() else []
    ends = time.monotonic() + 60 * args.minutes
    draw = random.Random(len(known))

    def record(entry: dict[str, Any]) -> bool:
        known.append(entry)
        with args.record.open("a") as file:
            print(json.dumps(entry), file=file)
        print(entry, flush=True)
        return sum("phase" in e for e in known) < args.kills and time.monotonic() < ends

    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        (base / "data").mkdir()
        data = make_data(base / "data")
        wanted = undisturbed(base, data)
        while sum("phase" in e for e in known) < args.kills and time.monotonic() < ends:
            place = base / f"killed-{len(known)}"
            place.mkdir()
            file, _ = make_run(data, place / "out", STEPS)
            killed_run(file, place / "out", draw, record)
            record({"ended": True, "bit_exact": result(place / "out") == wanted})
    summary(known)
    return int(not all(entry.get("bit_exact", True) for entry in known))


def undisturbed(base: Path, data: Path) -> dict[str, Any]:
    """The result of the run that nobody kills."""
    (base / "whole").mkdir()
    file, _ = make_run(data, base / "whole" / "out", STEPS)
    subprocess.run(flm("train", file), check=True, capture_output=True)
    return result(base / "whole" / "out")


def summary(known: list[dict[str, Any]]) -> None:
    """A table of the kills, and how the runs ended."""
    kills = [entry for entry in known if "phase" in entry]
    counts = Counter((entry["phase"], entry["killed"]) for entry in kills)
    print("| phase | all processes | one process |\n|---|---|---|")
    for phase in PHASES:
        print(f"| {phase} | {counts[phase, 'all processes']} | {counts[phase, 'one process']} |")
    ended = [entry["bit_exact"] for entry in known if "ended" in entry]
    print(f"{len(kills)} kills; {len(ended)} runs came to their end, {sum(ended)} of them with the same bits")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
