"""What a growth added, layer by layer, beside what was there: from the lines of `logging.growth_health`."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from flm_megatron.evaluation.report.chart import Chart, Point, Series
from flm_megatron.evaluation.report.curves import AXES, place
from flm_megatron.evaluation.report.history import History, Position
from flm_megatron.training.metrics.events import GrowthHealthEvent

LAYER = "layer_"
SIDES = ("old", "new")
NOTHING = 1e-8
"""Where an update of 0 is drawn on a logarithmic axis, so that what does not learn at all is seen too."""
Measurements = Sequence[tuple[Position, GrowthHealthEvent]]


def growth_charts(histories: Sequence[History]) -> list[Chart]:
    """Of each run its last grown stage that was measured: by layer at the last measurement, and over tokens."""
    return [chart for history in histories if history.health for chart in _charts(history)]


def _charts(history: History) -> list[Chart]:
    last = history.health[-1][1]
    lines = [(at, line) for at, line in history.health if line.stage == last.stage]
    title, step = f"{history.name}, {last.stage}", f"after step {last.step}"
    ranks = sorted({key.rsplit("_", 1)[0] for part in last.parts.values() for key in part if key.startswith("rank_")})
    updates = [_course(lines, side, index) for index, side in enumerate(SIDES)]
    by_rank = [line for index, rank in enumerate(ranks) for line in _sides(last, rank, 2 * index)]
    return [
        Chart(f"{title}: update over weight", AXES, f"mean over layers ({NOTHING:g}: none)", updates, log_y=True),
        _by_layer(
            f"{title}: update over weight {step}", f"norms ({NOTHING:g}: none)", _sides(last, "update"), log_y=True
        ),
        _by_layer(f"{title}: weights {step}", "root mean square", _sides(last, "weight_rms")),
        _by_layer(f"{title}: effective rank of channels {step}", "rank", by_rank),
        _by_layer(
            f"{title}: distance of layers from the identity", "1 - cos(input, output)", _distances(history, lines)
        ),
    ]


def _distances(history: History, lines: Measurements) -> list[Series]:
    """Before the growth, where layers were chosen by it; after the first measured step and after the last."""
    stage = lines[0][1].stage
    before = (
        [Series("before the growth", list(enumerate(history.distances[stage])), 2)]
        if stage in history.distances
        else []
    )
    ends = {line.step: line for _, line in (lines[0], lines[-1])}
    after = [
        Series(f"after step {step}", _values(line, "distance_cosine"), index)
        for index, (step, line) in enumerate(ends.items())
    ]
    return [*before, *after]


def _by_layer(title: str, y_label: str, series: Sequence[Series], log_y: bool = False) -> Chart:
    dotted = [Series(line.name, line.points, line.colour, dots=True) for line in series if line.points]
    return Chart(title, ("layer",), y_label, dotted, log_y=log_y)


def _sides(line: GrowthHealthEvent, key: str, colour: int = 0) -> list[Series]:
    """A number of every layer's old and new entries."""
    name = f"{key.removeprefix('rank_')}, " if key.startswith("rank_") else ""
    return [Series(f"{name}{side}", _values(line, f"{key}_{side}"), colour + i) for i, side in enumerate(SIDES)]


def _values(line: GrowthHealthEvent, key: str) -> list[Point]:
    layers = [(int(name.removeprefix(LAYER)), part) for name, part in line.parts.items() if name.startswith(LAYER)]
    least = NOTHING if key.startswith("update") else 0.0
    return [(float(layer), max(part[key], least)) for layer, part in layers if key in part]


def _course(lines: Measurements, side: str, colour: int) -> Series:
    means = [(place(at), [value for _, value in _values(line, f"update_{side}")]) for at, line in lines]
    return Series(side, [(*at, mean(values)) for at, values in means if values], colour, dots=True)
