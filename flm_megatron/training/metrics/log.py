"""How a step is reported: a log line, a JSON line, TensorBoard scalars."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TextIO

from tqdm import tqdm

from flm_megatron.checkpoint.lease.fence import check_fences
from flm_megatron.durable import make_folders, replace_file
from flm_megatron.training.metrics.events import FILE, Line, OtherEvent, RefusedEvent, StepEvent, line_text, parse_line

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from flm_megatron.training.telemetry.observers import Observers


DIVERGENCE = "distill_kl"
"""Key of a step's mean KL from the teacher to the student, in nats."""


def step_line(event: StepEvent, steps: int) -> str:
    """The log line for a step of a stage of `steps` steps."""
    divergence = event.extra.get(DIVERGENCE)
    taught = f"distill KL {divergence:.4f} | " if isinstance(divergence, float) else ""
    mfu = "n/a" if event.mfu is None else f"{100 * event.mfu:.1f}%"
    return (
        f"{event.stage} step {event.step}/{steps} | tokens {short(event.tokens)} | loss {event.loss:.4f} | {taught}"
        f"grad norm {event.grad_norm:.3f} | lr {event.lr:.3e} | "
        f"{short(event.tokens_per_s_per_device)} tokens/s/device | {event.tflops_per_device:.3g} TFLOP/s | "
        f"MFU {mfu} | memory {event.peak_memory_gib:.2f} GiB | left {duration(event.eta_s)}"
    )


def short(number: float) -> str:
    """A count with three digits and K, M, B or T."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= limit:
            return f"{number / limit:.3g}{unit}"
    return f"{number:.3g}"


def duration(seconds: float) -> str:
    """Time in its two largest units of days, hours, minutes and seconds."""
    whole = round(seconds)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days}d{hours:02d}h"
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{whole % 60:02d}s" if minutes else f"{whole}s"


class MetricsLog:
    """Writes the run's `metrics.jsonl`, `log.txt` and TensorBoard events, and prints to the terminal.

    Only the main rank makes one. When it is opened at a checkpoint's step it drops the lines of later steps, which will
    be trained again.
    """

    def __init__(
        self,
        folder: Path,
        tensorboard: bool,
        stages: list[str],
        stage: str,
        step: int,
        observers: Observers | None = None,
    ) -> None:
        make_folders(folder)
        self._observers = observers or None
        self._jsonl = _reopen(folder / FILE, stages, stage, step)
        self._text = (folder / "log.txt").open("a", encoding="utf-8")
        self._writer = _tensorboard(folder / "tensorboard", step) if tensorboard else None
        self._bar: tqdm[NoReturn] | None = None

    def begin(self, stage: str, step: int, steps: int) -> None:
        """Start a stage's progress bar (on a terminal only)."""
        self._bar = tqdm(total=steps, initial=step, desc=stage, unit="step", disable=not sys.stderr.isatty())

    def say(self, line: str) -> None:
        """Print a line and add it to `log.txt`."""
        print(line, file=self._text, flush=True)
        tqdm.write(line)
        sys.stdout.flush()

    def write(self, line: Line) -> None:
        """Write a line of `metrics.jsonl`; its numbers become TensorBoard scalars if it names a stage."""
        print(line_text(line), file=self._jsonl, flush=True)
        if self._observers is not None:
            self._observers.line(line)
        if self._writer is not None and line.stage is not None:
            for name, value in line.scalars().items():
                self._writer.add_scalar(f"{line.stage}/{name}", value, line.step)

    def record(self, values: Mapping[str, object]) -> None:
        """Write a hook's line unchanged; if it names `stage` and `step` its numbers go to TensorBoard too."""
        self.write(OtherEvent(values))

    def step(self, event: StepEvent, steps: int, speak: bool) -> None:
        """Report one step."""
        self.write(event)
        if self._bar is not None:
            self._bar.update(1)
        if speak:
            self.say(step_line(event, steps))

    def refused(self, event: RefusedEvent, line: str) -> None:
        """Report a step that was not applied, and print a line about it."""
        self.write(event)
        if self._bar is not None:
            self._bar.update(1)
        self.say(line)

    def sync(self) -> None:
        """Sync `metrics.jsonl` to disk, so that no checkpoint outlives the metrics of the steps before it."""
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
    """Open for appending, dropping what came after `step` of `stage`."""
    if path.exists():
        kept = lines_up_to(path, stages, stage, step)
        check_fences()
        replace_file(path, "".join(line + "\n" for line in kept).encode())
    return path.open("a", encoding="utf-8")


def lines_up_to(path: Path, stages: list[str], stage: str, step: int) -> list[str]:
    """The lines of a `metrics.jsonl` up to `step` of `stage`, without line ends; `stages` are the names in order."""
    return [line for line in path.read_text(encoding="utf-8").splitlines() if _is_before(line, stages, stage, step)]


def _is_before(text: str, stages: list[str], stage: str, step: int) -> bool:
    line = parse_line(text)
    if line is None:  # the process died in the middle of it
        return False
    if line.stage not in stages or line.step is None:
        return True
    return (stages.index(line.stage), line.step) <= (stages.index(stage), step)


def _tensorboard(folder: Path, step: int) -> SummaryWriter:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=step + 1)
