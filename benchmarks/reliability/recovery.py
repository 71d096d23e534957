"""Seconds from the loss of a host to the next step, and steps lost: from the neighbours' memory, and from the disk.

    OMP_NUM_THREADS=1 python -m benchmarks.reliability.recovery [--hidden 768] [--times 3]

Needs root and iproute2: three hosts are network namespaces of this machine, with one rank each. All processes of the
last one are killed and its cable is pulled; a fourth takes its place. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
import time
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import median

from benchmarks.reliability.timing import forget
from flm_megatron.training.metrics.events import RestartEvent, StepEvent, of_kind, read_events, read_lines
from tests.distributed.launch.test_nodes import ranks_on
from tests.distributed.launch.test_nodes_memory import lose
from tests.support.hosts import hosts, start_agent, start_job, wait_all
from tests.support.runs import make_data, make_run, wait_for_step

LIMIT_S = 240
LOST_AT, INTERVAL, SAVED = 18, 2, 10
"""The step after which the host is lost, and the steps between copies and between checkpoints."""
AFTER = 6


@dataclass(frozen=True)
class Recovery:
    """One loss: steps lost, seconds until ranks are started again, to the next step, and to where the run was."""

    lost: int
    started_s: float
    next_s: float
    back_s: float


def options(hidden: int, memory: bool) -> list[str]:
    """Overrides of the tests' small run."""
    model = {
        "num_layers": 6,
        "hidden_size": hidden,
        "ffn_hidden_size": 3 * hidden,
        "num_attention_heads": 8,
    }
    values: dict[str, int | str] = {f"stages.0.model.{key}": value for key, value in model.items()}
    values |= {
        "stages.0.parallel.tensor": 1,
        "stages.0.parallel.distributed_optimizer": "true",
        "stages.0.precision": "bf16",
        "stages.0.global_batch": 3,
        "stages.0.tokens": 32 * 3 * (LOST_AT + AFTER + SAVED),
        "stages.0.validation.samples": 0,
        "checkpoint.interval_steps": SAVED,
    }
    if memory:
        values["checkpoint.memory.interval_steps"] = INTERVAL
    return [word for key, value in values.items() for word in (f"--{key}", str(value))]


def lose_a_host(data: Path, folder: Path, hidden: int, memory: bool) -> Recovery:
    """Train, lose a host, and see how long it takes."""
    source, _ = make_run(data, folder, *options(hidden, memory))
    command = ["train", str(source)]
    with hosts(4) as machines:
        used, spare = machines[:3], machines[3]
        job = start_job(used, command, folder, restarts=3)
        wait_for_step(folder, LOST_AT, job[0], LIMIT_S)
        lose(used[2])
        began, reached, before = time.monotonic(), _steps(folder)[-1], ranks_on(used[0])
        if not memory:
            forget(folder)
        job[2] = start_agent(used, spare, command, folder, restarts=3)
        while ranks_on(used[0]) in (before, []):
            time.sleep(0.02)
        started_s = time.monotonic() - began
        first = _wait_for_restart(folder, job[0])
        next_s = time.monotonic() - began
        wait_for_step(folder, reached, job[0], LIMIT_S)
        back_s = time.monotonic() - began
        assert wait_all(job, LIMIT_S) == [0, 0, 0]
    return Recovery(reached - first, started_s, next_s, back_s)


def _steps(folder: Path) -> list[int]:
    return [step.step for step in read_events(folder, StepEvent)]


def _wait_for_restart(folder: Path, process: subprocess.Popen[str]) -> int:
    """Wait until the first step after the restart is done; the step that the run went on from."""
    while True:
        assert process.poll() is None, "the run has ended"
        lines = read_lines(folder)
        starts = [number for number, line in enumerate(lines) if isinstance(line, RestartEvent)]
        if starts and of_kind(lines[starts[-1] :], StepEvent):
            return of_kind(lines, RestartEvent)[-1].step
        time.sleep(0.02)


def main() -> None:
    """Lose a host several times each way, in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--times", type=int, default=3)
    options_ = parser.parse_args()
    found: dict[bool, list[Recovery]] = {True: [], False: []}
    with tempfile.TemporaryDirectory() as name:
        data = make_data(Path(name) / "data")
        for number in range(options_.times):
            for memory in (True, False):
                folder = Path(name) / f"{number}-{memory}"
                found[memory].append(lose_a_host(data, folder, options_.hidden, memory))
                print(memory, found[memory][-1], flush=True)
    print("| from | steps lost | to new ranks, s | to the next step, s | to where it was, s |\n|---|---|---|---|---|")
    for memory, values in found.items():
        lost, *seconds = (median(getattr(v, each.name) for v in values) for each in fields(Recovery))
        times = " | ".join(f"{value:.1f}" for value in seconds)
        print(f"| {'memory' if memory else 'the disk'} | {lost} | {times} |")


if __name__ == "__main__":
    main()
