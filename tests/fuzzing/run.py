"""Fuzz for a time and write what was found, as it goes: `python -m tests.fuzzing.run --seconds 3600 --out result.json`.

Every input follows from the seed and its number, so a finding can be repeated: `--seed S --only TARGET --first NUMBER`.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from flm_megatron.errors import FlmError
from tests.fuzzing.targets import Target, all_targets
from tests.fuzzing.watch import Violation, Watch, differences, snapshot

WARM_UP = 100
WRITE_EVERY_S = 30


class Fuzzer:
    """Runs inputs and counts what became of them."""

    def __init__(self, targets: dict[str, Target], seed: int, first: int = 0) -> None:
        self.targets, self.seed, self.number = targets, seed, first
        self.watch = Watch()
        self.findings: list[dict[str, Any]] = []
        self.outcomes = {name: {"accepted": 0, "refused": 0, "slowest_s": 0.0} for name in targets}

    def one(self, name: str) -> None:
        """The next input, for the target of that name."""
        self.number += 1
        target = self.targets[name]
        data = target.input(random.Random(f"{self.seed} {name} {self.number}"))
        target.prepare(data)
        self.watch.slowest = 0.0
        try:
            with self.watch.input(target.folder):
                self._read(name, target, data)
        except Violation as violation:
            self._found(name, str(violation), data)
        except Exception as error:  # anything but an FlmError is a finding
            self._found(name, f"{type(error).__name__}: {error}", data)
        slowest = self.outcomes[name]["slowest_s"]
        self.outcomes[name]["slowest_s"] = round(max(slowest, self.watch.slowest), 3)

    def _read(self, name: str, target: Target, data: bytes) -> None:
        try:
            target.read(data)
            self.outcomes[name]["accepted"] += 1
        except FlmError:
            self.outcomes[name]["refused"] += 1

    def _found(self, name: str, what: str, data: bytes) -> None:
        self.findings.append({"target": name, "number": self.number, "what": what[:300], "input": data[:3000].hex()})

    def run(self, seconds: float, warm_up: int = 0) -> None:
        """All targets by turns, for `seconds`, between two snapshots of the whole program.

        Before the first are `warm_up` turns: what is imported when it is first needed is there then.
        """
        for _ in range(warm_up):
            for name in self.targets:
                self.one(name)
        gc.collect()
        before, end = snapshot(), time.monotonic() + seconds
        while time.monotonic() < end:
            for name, target in self.targets.items():
                for _ in range(target.weight):
                    self.one(name)
        for changed in differences(before, snapshot()):
            self.findings.append({"target": "all", "number": self.number, "what": f"changed {changed}", "input": ""})

    def result(self, seconds: float) -> dict[str, Any]:
        """What to write."""
        return {"seconds": round(seconds), "seed": self.seed, "inputs": self.number, "targets": self.outcomes} | {
            "findings": self.findings
        }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="name of one target")
    parser.add_argument("--first", type=int, default=0, help="number before that of the first input")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        targets = all_targets(Path(folder))
        fuzzer = Fuzzer({n: t for n, t in targets.items() if args.only in ("", n)}, args.seed, args.first)
        began = time.monotonic()
        fuzzer.run(0, WARM_UP)
        while (spent := time.monotonic() - began) < args.seconds:
            fuzzer.run(min(WRITE_EVERY_S, args.seconds - spent))
            args.out.write_text(json.dumps(fuzzer.result(time.monotonic() - began), indent=1) + "\n")


if __name__ == "__main__":
    main()
