"""A simulated step as a picture: pipeline ranks over time, and what each of them spends the step on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from flm_megatron.planner.rehearsal.timing.step import RankSeconds, SimulatedStep
from flm_megatron.planner.report.plot import save_picture
from flm_megatron.planner.simulation.events import Span
from flm_megatron.planner.simulation.schedule import Pass

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = {
    "forward": "#4c78a8",
    "backward": "#72b7b2",
    "waiting for communication": "#e45756",
    "waiting for other pipeline ranks": "#eeeeee",
    "optimizer": "#b279a2",
}
PARTS = {
    "matmul": "#4c78a8",
    "attention": "#9ecae9",
    "memory_bound": "#72b7b2",
    "tensor": "#e45756",
    "pipeline": "#f58518",
    "data": "#eeca3b",
    "bubble": "#dddddd",
    "optimizer": "#b279a2",
}
SHOWN = 1.5
"""Times that the pipeline takes to fill which are shown of either end of the step."""


def draw_step(step: SimulatedStep, title: str, path: Path) -> Path:
    """Draw how the step begins and how it ends on every pipeline rank, and below what each rank spends it on.

    Returns the picture's path.

    Raises:
        RequestError: the picture cannot be written there, or not in that form.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ranks = step.schedule.pipeline
    figure = pyplot.figure(figsize=(11, 3.6 + 0.16 * ranks), layout="constrained")
    begin, end, parts = figure.subplot_mosaic([["begin", "end"], ["parts", "parts"]]).values()
    window = _window(step)
    _lanes(begin, step, 0.0, window, "the step begins")
    _lanes(end, step, step.seconds - window, step.seconds, "and ends")
    _parts(parts, step.ranks)
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=color) for color in COLORS.values()]
    above = figure.legend(handles, [*COLORS], loc="outside upper center", ncols=len(COLORS), fontsize=8, frameon=False)
    above.set_title(title)
    below = parts.get_legend_handles_labels()
    figure.legend(*below, loc="outside lower center", ncols=len(PARTS), fontsize=8, frameon=False)
    return save_picture(figure, path)


def _window(step: SimulatedStep) -> float:
    """Seconds shown of either end: half of a short step, of a longer one its first backward pass on every rank."""
    first = max(
        (span.end for span in step.simulation.spans if isinstance(span.what, Pass) and span.what.micro_batch == 0),
        default=step.seconds,
    )
    return min(SHOWN * first, step.seconds / 2)


def _lanes(axes: Axes, step: SimulatedStep, start: float, end: float, title: str) -> None:
    bars: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for span in step.simulation.spans:
        if span.stream == "compute" and span.end > start and span.begin < end:
            bars.setdefault((_color(span), span.rank), []).append((span.begin, span.end - span.begin))
    for (name, rank), spans in bars.items():
        axes.broken_barh(spans, (rank - 0.45, 0.9), facecolors=COLORS[name], linewidth=0)
    axes.set(title=title, xlabel="seconds", ylabel="pipeline rank", xlim=(start, end))
    axes.set_ylim(step.schedule.pipeline - 0.5, -0.5)


def _color(span: Span) -> str:
    if isinstance(span.what, Pass):
        return "backward" if span.what.backward else "forward"
    if span.what == "bubble":
        return "waiting for other pipeline ranks"
    if span.what in PARTS or span.what == "model":
        return "waiting for communication"
    return span.what.split()[0] if span.what.split()[0] in COLORS else "optimizer"


def _parts(axes: Axes, ranks: Sequence[RankSeconds]) -> None:
    left = [0.0] * len(ranks)
    for field in fields(RankSeconds):
        seconds = [getattr(rank, field.name) for rank in ranks]
        axes.barh(range(len(ranks)), seconds, left=left, color=PARTS[field.name], label=field.name.replace("_", "-"))
        left = [before + more for before, more in zip(left, seconds, strict=True)]
    axes.set(xlabel="seconds of the step", ylabel="pipeline rank")
    axes.set_ylim(len(ranks) - 0.5, -0.5)
