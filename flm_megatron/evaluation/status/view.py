"""A run's state as a terminal shows it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from flm_megatron.evaluation.status.state import RunState, goodput_line, growth_line
from flm_megatron.training.metrics.log import duration, short

BARS = "▁▂▃▄▅▆▇█"
PLAIN_BARS = "_.-~=+*#"
"""Heights of the sparkline where the terminal has ASCII alone."""
STYLES = {"running": "bold green", "finished": "bold green", "stopped": "yellow", "unknown": "yellow"}
GROWTHS_SHOWN = 3


def status_view(state: RunState, console: Console) -> RenderableType:
    """The view, as wide as the console."""
    ascii_only = console.options.ascii_only
    rows = Table.grid(padding=(0, 2), expand=True)
    rows.add_column(style="dim", no_wrap=True)
    rows.add_column(ratio=1, overflow="fold")
    for name, value in _rows(state, max(8, console.width - 20), ascii_only):
        rows.add_row(name, value)
    head = Text.assemble((state.run.name, "bold"), "  ", (state.state, STYLES.get(state.state, "bold red")))
    return Panel(Group(rows), title=head, title_align="left", border_style="dim", expand=True)


def sparkline(values: Sequence[float], width: int, ascii_only: bool = False) -> str:
    """Values as one line of at most `width` bars, each the mean of those that share it; empty without values."""
    bars = PLAIN_BARS if ascii_only else BARS
    columns = min(width, len(values))
    means = []
    for column in range(columns):
        part = values[column * len(values) // columns : (column + 1) * len(values) // columns]
        means.append(sum(part) / len(part))
    low, high = min(means, default=0.0), max(means, default=0.0)
    scale = (len(bars) - 1) / (high - low) if high > low else 0.0
    return "".join(bars[round((mean - low) * scale)] for mean in means)


def _rows(state: RunState, width: int, ascii_only: bool) -> Iterator[tuple[str, RenderableType]]:
    """Names and values, in the order in which they are shown."""
    progress = state.progress
    if progress.step is None:
        yield "stages", ", ".join(stage.name for stage in state.run.stages)
        yield "", "no step yet"
    else:
        yield from _step_rows(state, width, ascii_only)
    for event in progress.growths[-GROWTHS_SHOWN:]:
        yield "growth", growth_line(event)
    yield "ranks", _ranks(state)
    if progress.restarts or progress.refused:
        yield "restarts", f"{progress.restarts}, refused steps {progress.refused}"
    if state.account.total.wall_s:
        yield "goodput", goodput_line(state.account)
    yield "checkpoint", _checkpoint(state)
    yield "folder", str(state.folder)


def _step_rows(state: RunState, width: int, ascii_only: bool) -> Iterator[tuple[str, RenderableType]]:
    step, losses = state.progress.step, state.progress.losses.values
    assert step is not None
    names = [stage.name for stage in state.run.stages]
    steps = f"/{state.stage_steps}" if state.stage_steps is not None else ""
    yield "stage", f"{step.stage} ({names.index(step.stage) + 1} of {len(names)}), step {step.step}{steps}"
    left = f", {duration(step.eta_s)} of the stage left" if state.state == "running" and step.eta_s > 0 else ""
    yield "tokens", f"{short(step.tokens)} of {short(state.total_tokens)}{left}"
    yield "", ProgressBar(total=state.total_tokens or 1, completed=step.tokens, width=min(width, 60))
    if losses:
        yield "loss", Text(sparkline(losses, width, ascii_only), style="cyan")
    yield "", f"{step.loss:.4f} now, gradient norm {step.grad_norm:.3f}, learning rate {step.lr:.3e}"
    validation = state.progress.validation
    if validation is not None:
        yield "validation", f"{validation.loss:.4f} nats per token at {short(validation.tokens)} tokens"
    mfu = "not known" if step.mfu is None else f"{100 * step.mfu:.1f} %"
    speed = f"{short(step.tokens_per_s_per_device)} tokens/s/device, {step.tflops_per_device:.3g} TFLOP/s"
    yield "speed", f"{speed}, MFU {mfu}, {step.step_time_s:.3g} s a step"
    yield "memory", f"{step.peak_memory_gib:.2f} GiB at most on the first rank"


def _ranks(state: RunState) -> RenderableType:
    """How many processes train, and who holds the run's lease."""
    number = state.progress.ranks
    ranks = "number not known yet" if number is None else f"{number}"
    if state.stands_still and state.last_line_s is not None:
        return Text(f"{ranks}; nothing was written for {duration(state.last_line_s)}", style="bold red")
    said = {"killed": "gone without an end: ", "unknown": "of another host, not yet known to be alive: "}
    return f"{ranks}; {said.get(state.alive, '')}{state.holder}" if state.holder else ranks


def _checkpoint(state: RunState) -> str:
    if state.progress.saved is None:
        return "none yet"
    age = state.checkpoint_age_s
    return f"{state.progress.saved.path}" + ("" if age is None else f", {duration(age)} ago")
