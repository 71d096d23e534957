"""Which curves a report shows of one run, or of several side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from flm_megatron.evaluation.report.chart import Chart, Point, Series
from flm_megatron.evaluation.report.history import History, Line, Position

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
        _chart(histories, "Learning rate", "on the scale of `lr`", "lr"),
        _chart(histories, "Gradient norm", "global norm before clipping", "grad_norm", log_y=True),
        _chart(histories, "Throughput", "tokens/s per device", "tokens_per_s_per_device"),
        _chart(histories, "Model FLOP/s", "TFLOP/s per device", "tflops_per_device"),
        _chart(histories, "Memory", "peak, GiB per device", "peak_memory_gib"),
    ]
    if any(line.get("mfu") is not None for history in histories for _, line in history.steps):
        charts.append(_chart(histories, "Model FLOP utilisation", "share of peak FLOP/s", "mfu"))
    if any(history.refused_steps for history in histories):
        charts.append(_chart(histories, "Refused steps", "steps of the stage so far", "skipped_steps"))
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
        series.append(Series(f"{prefix}training", _points(history.steps, "loss", place), 2 * index))
        if history.validations:
            points = _points(history.validations, "val_loss", place)
            series.append(Series(f"{prefix}validation", points, 2 * index + 1, dots=True))
    return Chart("Loss", _axis_label(axis), "nats per token", series, _marks(histories, place), width=1100, height=380)


def _validation_chart(histories: Sequence[History]) -> Chart:
    place = _place("tokens")
    series: list[Series] = []
    for history in histories:
        prefix = f"{history.name}, " if len(histories) > 1 else ""
        keys = sorted({key for _, line in history.validations for key in line if key.startswith("val_loss/")})
        for key in keys:
            points = _points([(at, line) for at, line in history.validations if key in line], key, place)
            series.append(Series(prefix + key.removeprefix("val_loss/"), points, len(series), dots=True))
    return Chart("Validation loss by set", "tokens", "nats per token", series, _marks(histories, place))


def _chart(histories: Sequence[History], title: str, y_label: str, key: str, log_y: bool = False) -> Chart:
    place = _place("tokens")
    series = [
        Series(history.name, _points(history.steps, key, place), index) for index, history in enumerate(histories)
    ]
    return Chart(title, "tokens", y_label, series, _marks(histories, place), log_y)


def _points(lines: Sequence[tuple[Position, Line]], key: str, place: Callable[[Position], Any]) -> list[Point]:
    return [(place(at), float(line[key])) for at, line in lines if line.get(key) is not None]


def _marks(histories: Sequence[History], place: Callable[[Position], float]) -> list[tuple[float, str]]:
    """Where stages begin; of several runs with the names of the runs."""
    runs: dict[tuple[float, str], list[str]] = {}
    for history in histories:
        for at, stage in history.boundaries:
            runs.setdefault((place(at), stage), []).append(history.name)
    several = len(histories) > 1
    return [(at, f"→ {stage} ({', '.join(names)})" if several else f"→ {stage}") for (at, stage), names in runs.items()]
