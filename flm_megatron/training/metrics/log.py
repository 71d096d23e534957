"""What a step is reported as: one log line, one JSON object, TensorBoard scalars."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from flm_megatron.checkpoint.lease.fence import check_fences
from flm_megatron.durable import make_folders, replace_file


@dataclass(frozen=True)
class StepMetrics:
    """One step. Times in seconds, memory in GiB, TFLOP/s are model FLOPs; `mfu` is none for an unknown device;
    `skipped_steps` counts the steps of the stage that were refused so far."""

    stage: str
    step: int
    tokens: int
    loss: float
    grad_norm: float
    lr: float
    step_time_s: float
    tokens_per_s_per_device: float
    tflops_per_device: float
    mfu: float | None
    peak_memory_gib: float
    eta_s: float
    skipped_steps: int = 0

    def line(self, steps: int) -> str:
        """The log line."""
        mfu = "n/a" if self.mfu is None else f"{100 * self.mfu:.1f}%"
        return (
            f"{self.stage} step {self.step}/{steps} | tokens {short(self.tokens)} | loss {self.loss:.4f} | "
            f"grad norm {self.grad_norm:.3f} | lr {self.lr:.3e} | "
            f"{short(self.tokens_per_s_per_device)} tokens/s/device | {self.tflops_per_device:.3g} TFLOP/s | "
            f"MFU {mfu} | memory {self.peak_memory_gib:.2f} GiB | left {duration(self.eta_s)}"
        )


def short(number: float) -> str:
    """A count with three digits and K, M, B or T."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= limit:
            return f"{number / limit:.3g}{unit}"
    return f"{number:.3g}"


def duration(seconds: float) -> str:
    """Time as days, hours, minutes and seconds, the two largest that matter."""
    whole = round(seconds)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days}d{hours:02d}h"
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{whole % 60:02d}s" if minutes else f"{whole}s"


class MetricsLog:
    """Writes the run's `metrics.jsonl`, `log.txt` and TensorBoard events, and speaks on the terminal.

    Only the main rank makes one. Opened at a step that a checkpoint holds, it drops lines of later steps, which
    will be made again.
    """

    def __init__(self, folder: Path, tensorboard: bool, stages: list[str], stage: str, step: int) -> None:
        make_folders(folder)
        self._jsonl = _reopen(folder / "metrics.jsonl", stages, stage, step)
        self._text = (folder / "log.txt").open("a", encoding="utf-8")
        self._writer = _tensorboard(folder / "tensorboard", step) if tensorboard else None
        self._bar: Any = None

    def begin(self, stage: str, step: int, steps: int) -> None:
        """Start a stage's progress bar (on a terminal only)."""
        self._bar = tqdm(total=steps, initial=step, desc=stage, unit="step", disable=not sys.stderr.isatty())

    def say(self, line: str) -> None:
        """A line for people."""
        print(line, file=self._text, flush=True)
        tqdm.write(line)
        sys.stdout.flush()

    def record(self, values: dict[str, Any]) -> None:
        """A JSON object, and its numbers as TensorBoard scalars at `values["tokens"]`'s step."""
        print(json.dumps(values), file=self._jsonl, flush=True)
        if self._writer is not None:
            for name, value in values.items():
                if isinstance(value, float):
                    self._writer.add_scalar(f"{values['stage']}/{name}", value, values["step"])

    def step(self, metrics: StepMetrics, steps: int, speak: bool, norms: Mapping[str, float]) -> None:
        """Report one step, with norms of layers if they were asked for."""
        self.record({**asdict(metrics), **norms})
        if self._bar is not None:
            self._bar.update(1)
        if speak:
            self.say(metrics.line(steps))

    def refused(self, values: dict[str, Any], line: str) -> None:
        """Report a step that was not applied: `values` takes the place of its metrics."""
        self.record(values)
        if self._bar is not None:
            self._bar.update(1)
        self.say(line)

    def sync(self) -> None:
        """Have the disk hold what was recorded: a checkpoint must not outlive the metrics of the steps before it."""
        os.fsync(self._jsonl.fileno())

    def close(self) -> None:
        """Flush and close everything."""
        if self._bar is not None:
            self._bar.close()
        if self._writer is not None:
            self._writer.close()
        self._jsonl.close()
        self._text.close()


def _reopen(path: Path, stages: list[str], stage: str, step: int) -> TextIO:
    """Open for appending, keeping only what happened up to `step` of `stage`."""
    if path.exists():
        kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _is_before(line, stages, stage, step)]
        check_fences()
        replace_file(path, "".join(line + "\n" for line in kept).encode())
    return path.open("a", encoding="utf-8")


def _is_before(line: str, stages: list[str], stage: str, step: int) -> bool:
    try:
        values = json.loads(line)
    except json.JSONDecodeError:  # the process died in the middle of a line
        return False
    if values["stage"] not in stages:
        return True
    return (stages.index(values["stage"]), values["step"]) <= (stages.index(stage), step)


def _tensorboard(folder: Path, step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=step + 1)
