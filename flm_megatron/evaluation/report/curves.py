"""Which curves a report shows of one run, or of several side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from flm_megatron.evaluation.report.chart import Chart, Point, Series
from flm_megatron.evaluation.report.history import History, Position
from flm_megatron.training.metrics.events import StepEvent

AXES = {"tokens": "tokens", "flops": "model FLOPs", "seconds": "training time"}
"""Attributes of a position, and their names."""
HOUR_S = 3600.0


def loss_charts(histories: Sequence[History]) -> list[tuple[str, Chart]]:
    """Training loss, with mean validation loss, against each axis: (attribute, chart)."""
    return [(axis, _loss_chart(histories, axis)) for axis in AXES]


def detail_charts(histories: Sequence[History]) -> list[Chart]:
    """Everything else against tokens: validation by set, learning rate, gradient norm, speed, memory."""
    charts = [
        _validation_chart(histories),
        _chart(histories, "Learning rate", "on the scale of `lr`", lambda step: step.lr),
        _chart(histories, "Gradient norm", "global norm before clipping", lambda step: step.grad_norm, True),
        _chart(histories, "Throughput", "tokens/s per device", lambda step: step.tokens_per_s_per_device),
        _chart(histories, "Model FLOP/s", "TFLOP/s per device", lambda step: step.tflops_per_device),
        _chart(histories, "Memory", "peak, GiB per device", lambda step: step.peak_memory_gib),
    ]
    if any(step.mfu is not None for history in histories for _, step in history.steps):
        charts.append(_chart(histories, "Model FLOP utilisation", "share of peak FLOP/s", lambda step: step.mfu))
    if any(history.refused_steps for history in histories):
        charts.append(_chart(histories, "Refused steps", "steps of the stage so far", lambda step: step.skipped_steps))
    return [chart for chart in charts if any(series.points for series in chart.series)]


def _place(axis: str) -> Callable[[Position], float]:
    return lambda at: at.seconds / HOUR_S if axis == "seconds" else getattr(at, axis)


def _axis_label(axis: str) -> str:
    return "training time, hours (sum of step times)" if axis == "seconds" else AXES[axis]


def _loss_chart(histories: Sequence[History], axis: str) -> Chart:
    place = _place(axis)
    series = []
    for index, history in enumerate(histories):
        prefix = f"{history.name}, " if len(histories) > 1 else ""
        series.append(Series(f"{prefix}training", [(place(at), step.loss) for at, step in history.steps], 2 * index))
        if history.validations:
            points = [(place(at), event.loss) for at, event in history.validations]
            series.append(Series(f"{prefix}validation", points, 2 * index + 1, dots=True))
    return Chart("Loss", _axis_label(axis), "nats per token", series, _marks(histories, place), width=1100, height=380)


def _validation_chart(histories: Sequence[History]) -> Chart:
    place = _place("tokens")
    series: list[Series] = []
    for history in histories:
        prefix = f"{history.name}, " if len(histories) > 1 else ""
        for name in sorted({name for _, event in history.validations for name in event.by_set}):
            points = [(place(at), event.by_set[name]) for at, event in history.validations if name in event.by_set]
            series.append(Series(prefix + name, points, len(series), dots=True))
    return Chart("Validation loss by set", "tokens", "nats per token", series, _marks(histories, place))


def _chart(
    histories: Sequence[History],
    title: str,
    y_label: str,
    value: Callable[[StepEvent], float | None],
    log_y: bool = False,
) -> Chart:
    """A number of every step against tokens, where it is known."""
    place = _place("tokens")
    series = [
        Series(history.name, _points(history.steps, value, place), index) for index, history in enumerate(histories)
    ]
    return Chart(title, "tokens", y_label, series, _marks(histories, place), log_y)


def _points(
    steps: Sequence[tuple[Position, StepEvent]],
    value: Callable[[StepEvent], float | None],
    place: Callable[[Position], float],
) -> list[Point]:
    return [(place(at), float(y)) for at, step in steps if (y := value(step)) is not None]


def _marks(histories: Sequence[History], place: Callable[[Position], float]) -> list[tuple[float, str]]:
    """Where stages begin; of several runs with the names of the runs."""
    runs: dict[tuple[float, str], list[str]] = {}
    for history in histories:
        for at, stage in history.boundaries:
            runs.setdefault((place(at), stage), []).append(history.name)
    several = len(histories) > 1
    return [(at, f"→ {stage} ({', '.join(names)})" if several else f"→ {stage}") for (at, stage), names in runs.items()]
