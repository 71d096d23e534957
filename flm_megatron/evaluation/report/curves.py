"""Which curves a report shows of one run, or of several side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from flm_megatron.evaluation.report.chart import Chart, Point, Series
from flm_megatron.evaluation.report.history import History, Position
from flm_megatron.training.metrics.events import MASK, StepEvent

AXES = ("tokens", "model FLOPs", "training time, hours")
"""What the curves of a run are drawn against, at the reader's choice."""
HOUR_S = 3600.0


def loss_chart(histories: Sequence[History]) -> Chart:
    """Training loss, with mean validation loss."""
    series = []
    for index, history in enumerate(histories):
        prefix = _prefix(histories, history)
        series.append(Series(f"{prefix}training", [(*place(at), step.loss) for at, step in history.steps], 2 * index))
        if history.validations:
            points = [(*place(at), event.loss) for at, event in history.validations]
            series.append(Series(f"{prefix}validation", points, 2 * index + 1, dots=True))
    return Chart("Loss", AXES, "nats per token", series, marks(histories), wide=True)


def detail_charts(histories: Sequence[History]) -> list[Chart]:
    """Everything else: validation by set, evaluation, learning rate, gradient norm, masks, speed, memory."""
    charts = [
        _named_chart(histories, "Validation loss by set", "nats per token", _sets),
        *_evaluation_charts(histories),
        _chart(histories, "Learning rate", "on the scale of `lr`", lambda step: step.lr),
        _chart(histories, "Gradient norm", "global norm before clipping", lambda step: step.grad_norm, True),
        _chart(histories, "Growth masks", "0 closed, 1 open", _mask),
        _chart(histories, "Throughput", "tokens/s per device", lambda step: step.tokens_per_s_per_device),
        _chart(histories, "Model FLOP/s", "TFLOP/s per device", lambda step: step.tflops_per_device),
        _chart(histories, "Memory", "peak, GiB per device", lambda step: step.peak_memory_gib),
    ]
    if any(step.mfu is not None for history in histories for _, step in history.steps):
        charts.append(_chart(histories, "Model FLOP utilisation", "share of peak FLOP/s", lambda step: step.mfu))
    if any(history.refused_steps for history in histories):
        charts.append(_chart(histories, "Refused steps", "steps of the stage so far", lambda step: step.skipped_steps))
    return [chart for chart in charts if any(series.points for series in chart.series)]


def place(at: Position) -> tuple[float, float, float]:
    """Where a position lies on each of the axes."""
    return (at.tokens, at.flops, at.seconds / HOUR_S)


def marks(histories: Sequence[History]) -> list[tuple[tuple[float, ...], str]]:
    """Where stages begin; of several runs with the names of the runs."""
    runs: dict[tuple[tuple[float, ...], str], list[str]] = {}
    for history in histories:
        for at, stage in history.boundaries:
            runs.setdefault((place(at), stage), []).append(history.name)
    several = len(histories) > 1
    return [(at, f"→ {stage} ({', '.join(names)})" if several else f"→ {stage}") for (at, stage), names in runs.items()]


def _prefix(histories: Sequence[History], history: History) -> str:
    return f"{history.name}, " if len(histories) > 1 else ""


def _sets(history: History) -> list[tuple[Position, Mapping[str, float]]]:
    return [(at, event.by_set) for at, event in history.validations]


def _evaluation_charts(histories: Sequence[History]) -> list[Chart]:
    """A chart for each thing that was measured between steps, with a line for each text or task."""
    names = {name for history in histories for _, event in history.evaluations for name in event.values}
    groups = sorted({_group(name) for name in names})
    return [_named_chart(histories, f"Evaluation: {group}", group, partial(_evaluated, group)) for group in groups]


def _group(name: str) -> str:
    """What shares a chart: `bits_per_byte` of all texts, or one metric of all tasks."""
    first, _, last = name.partition("/")
    return first if first == "bits_per_byte" else last or first


def _evaluated(group: str, history: History) -> list[tuple[Position, Mapping[str, float]]]:
    return [
        (at, {name: value for name, value in event.values.items() if _group(name) == group})
        for at, event in history.evaluations
    ]


def _named_chart(
    histories: Sequence[History],
    title: str,
    y_label: str,
    measured: Callable[[History], list[tuple[Position, Mapping[str, float]]]],
) -> Chart:
    """A line for each name that was measured."""
    series: list[Series] = []
    for history in histories:
        values = measured(history)
        for name in sorted({name for _, by_name in values for name in by_name}):
            points = [(*place(at), by_name[name]) for at, by_name in values if name in by_name]
            series.append(Series(_prefix(histories, history) + name, points, len(series), dots=True))
    return Chart(title, AXES, y_label, series, marks(histories))


def _chart(
    histories: Sequence[History],
    title: str,
    y_label: str,
    value: Callable[[StepEvent], float | None],
    log_y: bool = False,
) -> Chart:
    """A number of every step, where it is known."""
    series = [Series(history.name, _points(history.steps, value), index) for index, history in enumerate(histories)]
    return Chart(title, AXES, y_label, series, marks(histories), log_y)


def _mask(step: StepEvent) -> float | None:
    """How far growth masks were open, while they were not."""
    value = step.extra.get(MASK)
    return float(value) if isinstance(value, (int, float)) else None


def _points(steps: Sequence[tuple[Position, StepEvent]], value: Callable[[StepEvent], float | None]) -> list[Point]:
    return [(*place(at), float(y)) for at, step in steps if (y := value(step)) is not None]
